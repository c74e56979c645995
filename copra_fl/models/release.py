"""Find the adapter of a run and its training, and write it in a form for other machines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copra_fl.config import Config, ConfigError, DataConfig
from copra_fl.models.card import Training
from copra_fl.models.export import SavedModel, load, save
from copra_fl.models.merged import export_merged
from copra_fl.reporting.results import load_run


def adapter_folder(path: Path) -> Path:
    """Return the adapter folder of `path`, which is a run folder or itself an adapter folder.

    Raises ConfigError for a folder without an adapter.
    """
    for folder in (path / "adapter", path):
        if (folder / "task.json").exists() and (folder / "adapter_config.json").exists():
            return folder
    if (path / "comparison.toml").exists():
        raise ConfigError(f"{path} is a comparison: name one of the runs in it")
    if (path / "config.toml").exists():
        raise ConfigError(f"{path} has no adapter: the run has not finished, or its rule trains one model per client")
    raise ConfigError(
        f"{path} is not the folder of a run or of an adapter: it has no adapter/task.json and no task.json"
    )


def training_of(adapter: Path) -> Training | None:
    """Return configuration and results of the run that the adapter folder lies in; None outside of a run folder."""
    folder = adapter.absolute().parent
    if not (folder / "config.toml").exists() or not (folder / "summary.json").exists():
        return None
    run = load_run(folder)
    assert run.summary is not None
    return Training(run.config, run.summary)


def data_settings(saved: SavedModel, adapter: Path, changes: Mapping[str, Any] | None = None) -> DataConfig:
    """Return the settings of the data that a model was trained on, with `changes`.

    They are those of the adapter folder; for a folder of an earlier version those of the run that it lies in. Raises
    ConfigError for invalid changes, and for a folder of an earlier version outside of its run.
    """
    settings = saved.data | dict(changes or {})
    if "max-length" in settings:
        return Config.from_flat(settings).data
    config = adapter.absolute().parent / "config.toml"
    if not config.exists():
        raise ConfigError(
            f"{adapter} is of an earlier version, which does not name the columns and max-length of its data; name the "
            "folder of its run instead"
        )
    return Config.from_flat(Config.from_toml(config).to_flat() | settings).data


def release(path: Path, directory: Path, merge: bool, dtype: str, base: str = "", dataset: str = "") -> None:
    """Write the model of a run or adapter folder `path` to the new folder `directory`.

    Args:
        merge: write a Transformers model with merged weights (`merged`), in `dtype`; else an adapter folder (`export`).
        base, dataset: as in `load`; with `merge` a model of several data sets needs one.

    Raises ConfigError for a `directory` that is not empty, and as `load` and `export_merged` do.
    """
    adapter = adapter_folder(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--to {directory} exists and is not an empty folder; name a new one")
    training = training_of(adapter)
    if merge:
        export_merged(adapter, directory, dtype, base, training, dataset)
        return
    saved = load(adapter, "cpu", base, dataset=dataset)
    settings = data_settings(saved, adapter)
    save(saved.model, directory, saved.labels, settings, training=training, datasets=saved.datasets)
    card = adapter / "README.md"
    if training is None and not dataset and card.exists():
        shutil.copy(card, directory / "README.md")
