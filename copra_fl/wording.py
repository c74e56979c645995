"""Phrases of messages: lists of names, unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def join_words(items: Iterable[object]) -> str:
    """``1, 2 and 3``."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in `known`: the closest one if there is one, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}"
