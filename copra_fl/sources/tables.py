"""Where examples come from: an asset, a user's CSV, JSONL or Parquet file or image folder, a Hugging Face data set.

Each source is a `Table` that knows a digest of its content and is read only when somebody needs its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from copra_fl.config import ConfigError, DataConfig
from copra_fl.files import digest_of, sha256
from copra_fl.sources.assets import ASSETS, fetch
from copra_fl.wording import unknown_name

if TYPE_CHECKING:  # slow to import, and needed only where the cache is empty
    import datasets
    import pandas as pd

FORMATS = (".csv", ".json", ".jsonl", ".parquet")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class TableError(ConfigError):
    """A file of examples that cannot be used.

    `public_message` is the message without what only who has the file may know: its name, its columns, its values.
    """

    def __init__(self, message: str, public_message: str) -> None:
        super().__init__(message)
        self.public_message = public_message


@dataclass(frozen=True)
class Table:
    """A table of examples.

    Attributes:
        where: it is, for messages.
        digest: of its content.
        read: reads it.
        folder: that relative paths in it are from.
    """

    where: str
    digest: str
    read: Callable[[], pd.DataFrame]
    folder: Path = Path()


def called(dataset: str) -> str:
    """What a data set is called beside others: a file or image folder by its name, a file's without ending."""
    path = Path(dataset)
    return path.stem if path.suffix.lower() in FORMATS or path.is_dir() else dataset


def find_tables(data: DataConfig) -> tuple[Table, Table | None]:
    """The training table and, where there is one, the test table."""
    test = file_table("test-file", Path(data.test_file)) if data.test_file else None
    known = [name for name, asset in ASSETS.items() if asset.kind == "data"]
    if data.dataset in known:
        folder = fetch(data.dataset)
        if test is None and (folder / "test.parquet").exists():
            test = file_table("dataset", folder / "test.parquet")
        return file_table("dataset", folder / "train.parquet"), test
    path = Path(data.dataset).expanduser()
    if _images(path / "train"):
        if test is None and _images(path / "test"):
            test = file_table("dataset", path / "test")
        return file_table("dataset", path / "train"), test
    if _images(path):
        return file_table("dataset", path), test
    if path.is_file() or path.suffix.lower() in FORMATS:
        return file_table("dataset", path), test
    if "/" not in data.dataset:
        raise ConfigError(
            f"{unknown_name('data set', data.dataset, known)}. It is no file in {Path.cwd()} either. "
            "A Hugging Face data set is written with its owner, as in stanfordnlp/imdb"
        )
    train, own_test = _hub_tables(data.dataset, data.label_column)
    return train, test or own_test


def file_table(key: str, path: Path) -> Table:
    """The table in the file or image folder `path`, which the setting `key` names.

    Raises TableError where there is none.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        return image_folder(key, path)
    if not path.is_file():
        raise TableError(f"{key}: there is no file {path}", f"{key}: there is no such file")
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise TableError(
            f"{key}: {path} ends in {path.suffix!r}, which is none of {known}",
            f"{key}: its file ends in none of {known}",
        )
    return Table(str(path), _sha256(key, path), lambda: _read_file(key, path), path.parent)


def image_folder(key: str, path: Path) -> Table:
    """The images in the subfolders of `path`, each of which is a label: columns ``image`` and ``label``.

    Raises TableError where there are none.
    """
    files = _images(path)
    if not files:
        raise TableError(
            f"{key}: the folder {path} has no images. It must have a subfolder for each label, with its images "
            f"({', '.join(IMAGES)}) in it",
            f"{key}: the folder has no images",
        )
    names = [str(file.relative_to(path)) for file in files]
    labels = [file.relative_to(path).parts[0] for file in files]

    def read() -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame({"image": names, "label": labels})

    return Table(str(path), digest_of(names, [_sha256(key, file) for file in files]), read, path)


def _images(folder: Path) -> list[Path]:
    """The images in the subfolders of `folder`; none where it is no folder."""
    return sorted(file for file in folder.glob("*/**/*") if file.suffix.lower() in IMAGES)


def _sha256(key: str, path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise TableError(
            f"{key}: cannot read {path}: {error.strerror}", f"{key}: cannot read its file: {error.strerror}"
        ) from error


def _read_file(key: str, path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        if not path.stat().st_size:
            return pd.DataFrame()
        match path.suffix.lower():
            case ".csv":  # with pandas' own defaults, labels and texts such as "NA" or "null" count as missing
                return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
            case ".parquet":
                return pd.read_parquet(path)
            case _:
                return pd.read_json(path, lines=True, dtype=False)
    except (ValueError, OSError) as error:
        kind = {".csv": "CSV in UTF-8", ".parquet": "Parquet"}.get(path.suffix.lower(), "JSON, one object a line")
        raise TableError(
            f"{key}: {path} cannot be read as {kind}: {error}", f"{key}: its file cannot be read as {kind}"
        ) from error


def _hub_tables(name: str, label_column: str) -> tuple[Table, Table | None]:
    """A data set of the Hugging Face hub, or of its cache without a network; ``owner/name:subset`` for a subset."""
    import datasets

    datasets.disable_progress_bars()
    path, _, subset = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(path, subset or None)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:  # every kind of error from network, cache, and a foreign data set's files
        known = ", ".join(name for name, asset in ASSETS.items() if asset.kind == "data")
        called = ", ".join(repr(part) for part in (path, subset) if part)
        raise ConfigError(
            f"dataset = {name!r} is no asset ({known}) and no file in {Path.cwd()}, and it could not be had from the "
            f"Hugging Face hub: {error}. To use a data set of the hub without a network, run "
            f"`datasets.load_dataset({called}, split='train').to_parquet('train.parquet')` where there is one, bring "
            "the file here and set dataset to its path"
        ) from error
    if "train" not in splits:
        raise ConfigError(f"dataset = {name!r} has no split 'train'; it has {', '.join(splits)}")

    def table(split: str) -> Table:
        digest = digest_of(builder.hash, builder.config_id, split)
        return Table(f"{name} ({split})", digest, lambda: _read_split(splits[split]))

    # A test set whose labels are kept secret, as GLUE's, has -1 for all of them.
    test = splits.get("test")
    hidden = test is None or (label_column in test.features and test.unique(label_column) == [-1])
    return table("train"), None if hidden else table("test")


def _read_split(split: datasets.Dataset) -> pd.DataFrame:
    """A split as a table, with labels' names for their numbers."""
    table = split.to_pandas()
    for column, feature in split.features.items():
        if hasattr(feature, "names"):
            table[column] = table[column].map(dict(enumerate(feature.names)))
    return table


def read_examples(
    table: Table, columns: Mapping[str, str], readers: Mapping[str, Callable[[pd.Series, Path], pd.Series]]
) -> tuple[pd.DataFrame, int]:
    """The wanted columns under their configuration keys, and how many rows were dropped for lacking one.

    As texts, but where `readers` have another way for a key, which gets the table's folder too, and gives NA for what
    is missing.
    """
    import pandas as pd

    rows = table.read()
    if rows.empty:
        raise TableError(f"{table.where} has no examples", "its file has no examples")
    for key, column in columns.items():
        if column not in rows:
            there = ", ".join(map(str, rows.columns))
            raise TableError(
                f"{key} = {column!r} is not a column of {table.where}; there are: {there}",
                f"{key} = {column!r} is not a column of its file",
            )
    read = pd.DataFrame(
        {
            key: readers[key](rows[column], table.folder) if key in readers else as_text(rows[column])
            for key, column in columns.items()
        }
    )
    complete = read.notna().all(axis=1)
    if not complete.any():
        wanted = ", ".join(map(repr, columns.values()))
        raise TableError(
            f"{table.where} has no example with all of {wanted}", f"its file has no example with all of {wanted}"
        )
    return read[complete].reset_index(drop=True), int((~complete).sum())


def as_text(column: pd.Series) -> pd.Series:
    """Texts, the same from every format: whole numbers with gaps, which pandas reads as floats, lose their .0.

    Blank ones count as missing.
    """
    if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    texts = column.astype("string")
    return texts.mask((texts.str.strip() == "").fillna(False))


def codes(column: pd.Series, names: list[str]) -> Tensor:
    """(N,) int64: where each text is in `names`; -1 for a missing one."""
    import pandas as pd

    return torch.from_numpy(pd.Categorical(column, categories=names).codes.astype(np.int64))
