"""Phrases of messages: lists of names, unknown names."""

from __future__ import annotations

from collections.abc import Iterable


def join_words(items: Iterable[object]) -> str:
    """``1, 2 and 3``."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last
