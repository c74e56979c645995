"""`copra-fl recipes`: the built-in recipes and methods, with one line each."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from copra_fl.console import plain_console
from copra_fl.simulation.recipes import built_in_methods, built_in_recipes, summary_line


def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON: kind -> name -> {summary, path}.")] = False,
) -> None:
    """List the built-in recipes (--recipe) and methods (--methods)."""
    paths = {"recipes": built_in_recipes(), "methods": built_in_methods()}
    listing = {
        kind: {name: {"summary": summary_line(path), "path": str(path)} for name, path in by_name.items()}
        for kind, by_name in paths.items()
    }
    if as_json:
        print(json.dumps(listing, indent=2))
        return
    console = plain_console()
    for kind, entries in listing.items():
        table = Table(kind, "summary", title_justify="left")
        for name, entry in entries.items():
            table.add_row(name, entry["summary"])
        console.print(table)
