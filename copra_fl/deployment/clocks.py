"""Clocks of nodes: Flower accepts a request only if its time is near the server's."""

from __future__ import annotations

#: seconds that a node's clock may be ahead of the server's, and that it may be behind it
MAX_AHEAD, MAX_BEHIND = 5, 305


def describe(seconds_ahead: float) -> str:
    """Return what is wrong with a clock that is so far ahead of the server's, or behind it if negative."""
    side = "ahead of" if seconds_ahead > 0 else "behind"
    return (
        f"clock is {abs(seconds_ahead):.0f} s {side} the server's, and may be at most {MAX_AHEAD} s ahead of it and "
        f"{MAX_BEHIND} s behind it; set the time of that machine"
    )
