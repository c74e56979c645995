"""`copra-fl predict`: classify the rows of a file with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from copra_fl.cli.options import BaseOption, DatasetOption, DataSettingsOption, DeviceName, DeviceOption, ModelArgument
from copra_fl.config import KEYS, ConfigError, DataConfig
from copra_fl.console import plain_console
from copra_fl.simulation.recipes import parse_override


def predict(
    run: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="CSV, TSV, JSONL or Parquet file with the column of the training data, or a folder of images.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path,
        typer.Option("--to", help="CSV, TSV, JSONL or Parquet file for the predictions; replaced.", show_default=False),
    ],
    dataset: DatasetOption = "",
    set_: DataSettingsOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows per batch.")] = 64,
    device: DeviceOption = DeviceName.AUTO,
    base: BaseOption = "",
) -> None:
    """Write the label and the probabilities that the model of a run gives to each row of a file.

    The rows keep their order and their columns; `predicted` and `probability LABEL` are added. If the file has the
    label column of the training data too, accuracy and macro-F1 are printed.
    """
    from copra_fl import startup

    startup.prepare()
    from copra_fl.models import prediction
    from copra_fl.models.export import load_exact
    from copra_fl.models.release import adapter_folder, data_settings
    from copra_fl.sources.tables import check_target, file_table, write_table

    check_target("--to", to)
    changes = dict(parse_override(text, KEYS) for text in set_ or [])
    if others := [key for key in changes if key in KEYS and KEYS[key].owner != "data"]:
        raise ConfigError(
            f"--set {others[0]} has no effect on a prediction; only keys of the data have, see copra-fl config"
        )
    adapter = adapter_folder(run)
    table = file_table("--data", data, str(changes.get("separator", DataConfig.separator)))
    saved = load_exact(adapter, device, base, dataset)
    settings = data_settings(saved, adapter, changes)
    with Progress(console=plain_console(stderr=True), transient=True) as progress:
        bar = progress.add_task("predicting", total=None)
        rows = prediction.predict(
            saved, table, settings, batch_size, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    try:
        write_table(to, rows)
    except OSError as error:
        raise ConfigError(f"cannot write --to {to}: {error.strerror}") from error
    typer.echo(f"{to}: {len(rows)} rows")
    if score := prediction.score(rows, saved.labels, settings.label_column):
        where = f"{score.examples} rows with a label in {settings.label_column!r}"
        typer.echo(f"accuracy {score.accuracy:.1%}, macro-F1 {score.macro_f1:.1%} ({where})")
        if score.unknown:
            typer.echo(f"{score.unknown} of them have a label that the model does not have, and count as errors")
