"""Phrases of messages: lists of words, unknown names, and texts from elsewhere."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

#: longest text of a node that is stored or shown, in characters
MAX_FOREIGN = 2000


def join_words(items: Iterable[object]) -> str:
    """Return `items` as in ``1, 2 and 3``."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a `name` that is not in `known`, with the closest known name and all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}"


def foreign(text: object, limit: int = MAX_FOREIGN) -> str:
    """Return a text that another machine has sent as it may be stored and shown: short, and on one line.

    Control and format characters go, because terminals and log readers obey them; line ends become ``|``. Of a longer
    text the middle is left out: an error's cause is at its end.
    """
    head, tail = limit // 4, limit - limit // 4
    text = str(text)
    if len(text) > limit:
        text = f"{text[:head]} [... {len(text) - limit} characters ...] {text[-tail:]}"
    line = " | ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(char for char in line if unicodedata.category(char) not in ("Cc", "Cf"))
