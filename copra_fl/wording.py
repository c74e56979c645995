"""Phrases of messages: lists of words, unknown names, and texts from elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

#: longest text of a node that is stored or shown, in characters
MAX_FOREIGN = 2000
#: number of items of a long list that a message names
MAX_LISTED = 20
#: stands for the end of a line in such a text
LINE_END = " | "


def join_words(items: Iterable[object]) -> str:
    """Return `items` as in ``1, 2 and 3``."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last


def listed(items: Sequence[object]) -> str:
    """Return the first `MAX_LISTED` of `items`, and the number of the others."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(map(str, items[:MAX_LISTED])) + more


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a `name` that is not in `known`, with the closest known name and all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}"


def foreign(text: object, limit: int = MAX_FOREIGN) -> str:
    """Return a text that another machine has sent as it may be stored and shown: short, and on one line.

    Characters that cannot be printed go, because terminals and log readers obey some of them; line ends become ``|``.
    Of a longer text the middle is left out: an error's cause is at its end.
    """
    lines = (part.strip() for part in shortened(str(text), limit).splitlines())
    line = LINE_END.join("".join(filter(str.isprintable, part)) for part in lines if part)
    return shortened(line, limit)


def shortened(text: str, limit: int) -> str:
    """Return `text` without its middle if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    gap = f" [... {len(text) - limit} characters ...] "
    head = limit // 4
    return text[:head] + gap + text[head + len(gap) - limit :]
