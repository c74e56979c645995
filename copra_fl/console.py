"""The console of commands and of the Python interface."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """Return a rich Console that prints text as it is: names and messages may hold what rich takes for markup."""
    return Console(markup=False, highlight=False, **options)
