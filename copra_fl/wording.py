"""Phrases of messages: lists of words, unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
