"""`copra-fl export`: write the model of a run for other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from copra_fl.cli.options import (
    BaseOption,
    DatasetOption,
    DtypeName,
    DtypeOption,
    MergeOption,
    ModelArgument,
    writable_folder,
)


def export(
    run: ModelArgument,
    to: Annotated[
        Path, typer.Option("--to", help="New folder for the model.", show_default=False, callback=writable_folder)
    ],
    merge: MergeOption = False,
    dataset: DatasetOption = "",
    dtype: DtypeOption = DtypeName.FLOAT32,
    base: BaseOption = "",
) -> None:
    """Write the model of a run to a folder that opens on other machines: an adapter for PEFT, or merged weights.

    README.md in the folder says how to load it. A merged model opens with transformers.pipeline.
    """
    from copra_fl import startup

    startup.prepare()
    from copra_fl.models.release import release

    release(run, to, merge, dtype, base, dataset)
    typer.echo(f"{to}: {', '.join(sorted(path.name for path in to.iterdir()))}")
