"""`copra-fl push`: upload the model of a run to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from copra_fl.cli.options import BaseOption, DatasetOption, DtypeName, DtypeOption, MergeOption, ModelArgument


def push(
    run: ModelArgument,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Model on the hub; created if needed.", show_default=False)
    ],
    merge: MergeOption = False,
    dataset: DatasetOption = "",
    dtype: DtypeOption = DtypeName.FLOAT32,
    base: BaseOption = "",
    private: Annotated[bool, typer.Option("--private", help="Create a private model.")] = False,
) -> None:
    """Upload the model of a run, with its model card, to the Hugging Face hub or the server in HF_ENDPOINT.

    It needs an access token: `hf auth login`, or HF_TOKEN.
    """
    from copra_fl import startup

    startup.prepare()
    from copra_fl.models import hub
    from copra_fl.models.release import release

    hub.check_access(repository)
    with TemporaryDirectory(prefix="copra-fl-push-") as folder:
        directory = Path(folder) / repository.rpartition("/")[2]
        release(run, directory, merge, dtype, base, dataset)
        typer.echo(hub.push(directory, repository, private))
