"""Tables of examples: an asset, a CSV, TSV, JSONL or Parquet file, an image folder, or a data set of the hub.

Each source is a `Table`, which has a digest of its content and is read only when its examples are needed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from copra_fl.config import ConfigError, DataConfig
from copra_fl.files import atomic_write, digest_of, kept_digest, sha256
from copra_fl.sources.assets import ASSETS, fetch, is_asset
from copra_fl.wording import listed, unknown_name

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import datasets
    import pandas as pd

FORMATS = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
#: formats of tables that are not read
OTHER_FORMATS = (".feather", ".ods", ".txt", ".xls", ".xlsm", ".xlsx")
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class TableError(ConfigError):
    """A file of examples that cannot be used.

    Attributes:
        public_message: the message without names, columns and values of the file, which may be private.
    """

    def __init__(self, message: str, public_message: str) -> None:
        super().__init__(message)
        self.public_message = public_message


@dataclass(frozen=True)
class Table:
    """A table of examples.

    Attributes:
        where: its path or name, for messages.
        digest: digest of its content.
        read: function that reads it.
        folder: folder that relative paths in the table start from.
    """

    where: str
    digest: str
    read: Callable[[], pd.DataFrame]
    folder: Path = Path()


def dataset_name(dataset: str) -> str:
    """Return the short name of a data set: for a file its name without suffix, for a folder its name."""
    path = Path(dataset)
    return path.stem if path.suffix.lower() in FORMATS or path.is_dir() else dataset


def find_tables(data: DataConfig) -> tuple[Table, Table | None]:
    """Return the training table, and the test table if there is one.

    Raises ConfigError for a data set that does not exist or cannot be read, AssetError as `fetch` does.
    """
    test = file_table("test-file", Path(data.test_file), data.separator) if data.test_file else None
    if is_asset(data.dataset, "data"):
        folder = fetch(data.dataset)
        if test is None and (folder / "test.parquet").exists():
            test = file_table("dataset", folder / "test.parquet")
        return file_table("dataset", folder / "train.parquet"), test
    path = Path(data.dataset).expanduser().absolute()
    if train_images := _images(path / "train"):
        if test is None and (test_images := _images(path / "test")):
            test = image_folder("dataset", path / "test", test_images)
        return image_folder("dataset", path / "train", train_images), test
    if images := _images(path):
        return image_folder("dataset", path, images), test
    if path.is_file() or path.suffix.lower() in (*FORMATS, *OTHER_FORMATS):
        return file_table("dataset", path, data.separator), test
    if "/" not in data.dataset:
        known = [name for name, asset in ASSETS.items() if asset.kind == "data"]
        raise ConfigError(
            f"{unknown_name('data set', data.dataset, known)}. It is not a file in {Path.cwd()} either. "
            "Write a Hugging Face data set with its owner, as in stanfordnlp/imdb"
        )
    train, hub_test = _hub_tables(data.dataset, data.label_column)
    return train, test or hub_test


def file_table(key: str, path: Path, separator: str = DataConfig.separator) -> Table:
    """Return the table in the file or image folder `path`, the value of the setting `key`.

    `separator` is the value of the setting of that name.

    Raises TableError for a path that does not exist or has another format.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        return image_folder(key, path, _images(path))
    if not path.is_file():
        raise TableError(f"{key}: there is no file {path}", f"{key}: there is no such file")
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise TableError(
            f"{key}: {path} ends in {path.suffix!r}; supported formats are {known}. Save a spreadsheet as CSV",
            f"{key}: the format of its file is not supported; supported formats are {known}",
        )
    with _readable(key, path):
        digest = kept_digest([path], lambda: sha256(path))
    return Table(str(path), digest, lambda: _read_file(key, path, separator), path.parent)


def image_folder(key: str, path: Path, files: list[Path]) -> Table:
    """Return the table of the images `files` in the subfolders of `path`, one subfolder per label.

    Its columns are ``image`` and ``label``. Raises TableError for a folder without images.
    """
    if not files:
        raise TableError(
            f"{key}: the folder {path} has no images. It must have one subfolder per label, with the label's images "
            f"({', '.join(IMAGES)}) in it",
            f"{key}: the folder has no images",
        )
    names = [str(file.relative_to(path)) for file in files]
    labels = [file.relative_to(path).parts[0] for file in files]

    def read() -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame({"image": names, "label": labels})

    with _readable(key, path):
        digest = kept_digest(files, lambda: digest_of(names, [sha256(file) for file in files]))
    return Table(str(path), digest, read, path)


def _images(folder: Path) -> list[Path]:
    """Return the images in the subfolders of `folder`; none if it is not a folder."""
    return sorted(file for file in folder.glob("*/**/*") if file.suffix.lower() in IMAGES)


@contextmanager
def _readable(key: str, path: Path) -> Iterator[None]:
    """Raise TableError for an error of the file system inside the block; `path` is a file, or a folder of files."""
    try:
        yield
    except OSError as error:
        raise TableError(
            f"{key}: cannot read {error.filename or path}: {error.strerror}",
            f"{key}: cannot read its file: {error.strerror}",
        ) from error


def _read_file(key: str, path: Path, separator: str) -> pd.DataFrame:
    import pandas as pd
    import pyarrow.parquet

    try:
        if not path.stat().st_size:
            return pd.DataFrame()
        match path.suffix.lower():
            case ".csv" | ".tsv" as suffix:
                return _read_csv(path, SEPARATORS.get(separator, "\t" if suffix == ".tsv" else ","))
            case ".parquet":  # by default integers with gaps become floats, which lose digits
                return pyarrow.parquet.read_table(path, partitioning=None).to_pandas(integer_object_nulls=True)
            case _:
                return _read_json_lines(path)
    except (ValueError, OSError) as error:
        format_name = {".csv": "CSV in UTF-8", ".tsv": "CSV in UTF-8", ".parquet": "Parquet"}.get(
            path.suffix.lower(), "JSON with one object per line"
        )
        raise TableError(
            f"{key}: {path} cannot be read as {format_name}: {error}",
            f"{key}: its file cannot be read as {format_name}",
        ) from error


def _read_csv(path: Path, separator: str) -> pd.DataFrame:
    """Return the table in a CSV file. Raises ValueError for rows that do not fit the header."""
    import pandas as pd

    # by default pandas reads texts such as "NA" or "null" as missing
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_values=[""])
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first fields of longer rows as names of the rows
        raise ValueError(
            f"its rows have more fields than its header. Quote texts that contain {separator!r}, and remove a "
            f"{separator!r} at the end of rows"
        )
    return table


def _read_json_lines(path: Path) -> pd.DataFrame:
    """Return the table in a file with one JSON object per line; integers with gaps stay integers.

    Raises ValueError for another line.
    """
    import pandas as pd

    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_json_object(line.strip(), number))
    table = pd.DataFrame(rows, dtype=object)
    return pd.DataFrame(
        {name: column if _has_gaps(column) else column.infer_objects() for name, column in table.items()}
    )


def _json_object(line: str, number: int) -> dict[str, Any]:
    """Return the object in the `line` of that `number`. Raises ValueError for another content."""
    if not line.startswith("{"):
        raise ValueError(
            f"line {number} begins with {line[0]!r}, not with an object. Write each object on a line of its own, "
            "without an array around them"
        )
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _has_gaps(column: pd.Series) -> bool:
    """Return True for a column of integers and missing values, which pandas would make floats."""
    entries = column.dropna()
    return len(entries) < len(column) and all(type(entry) is int for entry in entries)


def check_target(key: str, path: Path) -> None:
    """Raise ConfigError unless `write_table` can write to `path`, the value of the option `key`."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{key} {path} ends in {path.suffix!r}; supported formats are {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{key} {path}: there is no folder {path.absolute().parent}")


def write_table(path: Path, rows: pd.DataFrame) -> None:
    """Write `rows` to a file of one of FORMATS, as `file_table` reads it. Raises OSError, ConfigError for Parquet."""
    content: str | bytes
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            separator = "\t" if suffix == ".tsv" else ","
            content = _with_json(rows).to_csv(index=False, sep=separator, quoting=csv.QUOTE_NONNUMERIC)
        case ".parquet":
            content = parquet_bytes(str(path), rows)
        case _:
            content = rows.to_json(
                orient="records", lines=True, force_ascii=False, double_precision=15, date_format="iso"
            )
    atomic_write(path, content)


def _with_json(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `rows` with lists, arrays and dicts as JSON, for a file of texts and numbers."""
    import pandas as pd

    return pd.DataFrame(
        {
            name: pd.Series(map(_as_json, column), rows.index, object) if column.dtype == object else column
            for name, column in rows.items()
        }
    )


def _as_json(value: Any) -> Any:
    """Return a list, an array or a dict as JSON, another value as it is."""
    if not isinstance(value, list | np.ndarray | dict):
        return value
    return json.dumps(
        value,
        ensure_ascii=False,
        default=lambda part: part.tolist() if isinstance(part, np.ndarray | np.generic) else str(part),
    )


def parquet_bytes(name: str, rows: pd.DataFrame) -> bytes:
    """Return `rows` as a Parquet file. Raises ConfigError, which begins with `name`, for values it cannot store."""
    import pyarrow

    try:
        return rows.to_parquet(index=False)
    except (ValueError, TypeError, OverflowError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{name} cannot be stored as Parquet: {' '.join(map(str, error.args))}") from error


def _hub_tables(name: str, label_column: str) -> tuple[Table, Table | None]:
    """Return the tables of a data set of the Hugging Face hub, or of the hub's cache without a network.

    ``owner/name:subset`` is a subset. Raises ConfigError for a data set that cannot be loaded.
    """
    import datasets

    datasets.disable_progress_bars()
    path, _, subset = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(path, subset or None)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:  # network, cache and the data set's own files raise errors of many types
        known = ", ".join(name for name, asset in ASSETS.items() if asset.kind == "data")
        arguments = ", ".join(repr(part) for part in (path, subset) if part)
        raise ConfigError(
            f"dataset = {name!r} is not an asset ({known}), not a file in {Path.cwd()}, and could not be loaded from "
            f"the Hugging Face hub: {error}. To use a data set of the hub without a network, run "
            f"`datasets.load_dataset({arguments}, split='train').to_parquet('train.parquet')` on a machine with a "
            "network, copy the file here and set dataset to its path"
        ) from error
    if "train" not in splits:
        raise ConfigError(f"dataset = {name!r} has no split 'train'; it has {', '.join(splits)}")

    def table(split: str) -> Table:
        digest = digest_of(builder.hash, builder.config_id, split)
        return Table(f"{name} ({split})", digest, lambda: read_split(splits[split]))

    # A test set with secret labels, as GLUE's, has the label -1 everywhere.
    test = splits.get("test")
    is_hidden = test is None or (label_column in test.features and test.unique(label_column) == [-1])
    return table("train"), None if is_hidden else table("test")


def read_split(split: datasets.Dataset) -> pd.DataFrame:
    """Return a split as a table, with label names in place of label numbers."""
    table = split.with_format("arrow")[:].to_pandas(integer_object_nulls=True)
    for column, feature in split.features.items():
        if hasattr(feature, "names"):
            table[column] = table[column].map(dict(enumerate(feature.names)))
    return table


def read_examples(
    table: Table, columns: Mapping[str, str], readers: Mapping[str, Callable[[pd.Series, Path], pd.Series]]
) -> tuple[pd.DataFrame, int]:
    """Return `columns` of `table` under their configuration keys, and the number of dropped incomplete rows.

    Values are texts, unless `readers` has a function for the key: from the column and the table's folder to values,
    with NA for missing ones. Raises TableError for a table without examples or without one of the columns.
    """
    read, complete = _read_columns(table, table.read(), columns, readers)
    return read[complete].reset_index(drop=True), int((~complete).sum())


def named_files(table: Table, column: str) -> list[str]:
    """Return the entries of `column` that are paths, relative to the table's folder; none without such a column."""
    entries = map(path_or_bytes, table.read().get(column, []))
    return [entry for entry in entries if isinstance(entry, str) and entry.strip()]


def path_or_bytes(entry: Any) -> Any:
    """Return the bytes or else the path in a dict of both, as Hugging Face data sets have them; else the entry."""
    return entry.get("bytes") or entry.get("path") if isinstance(entry, dict) else entry


def read_rows(
    table: Table, columns: Mapping[str, str], readers: Mapping[str, Callable[[pd.Series, Path], pd.Series]]
) -> pd.DataFrame:
    """Return the examples of `read_examples` in the same order, with all columns of `table` as they are."""
    rows = table.read()
    _, complete = _read_columns(table, rows, columns, readers)
    return rows[complete].reset_index(drop=True)


def _read_columns(
    table: Table,
    rows: pd.DataFrame,
    columns: Mapping[str, str],
    readers: Mapping[str, Callable[[pd.Series, Path], pd.Series]],
) -> tuple[pd.DataFrame, pd.Series]:
    """Return `columns` of `rows` under their configuration keys, and which rows have a value in each of them."""
    import pandas as pd

    if rows.empty:
        raise TableError(f"{table.where} has no examples", "its file has no examples")
    for key, column in columns.items():
        if column not in rows:
            raise TableError(
                f"{key} = {column!r} is not a column of {table.where}; its columns are {listed(list(rows))}"
                f"{separator_hint(rows)}",
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
        names = ", ".join(map(repr, columns.values()))
        raise TableError(
            f"{table.where} has no example with all of {names}", f"its file has no example with all of {names}"
        )
    return read, complete


def separator_hint(rows: pd.DataFrame) -> str:
    """Return a hint at ``separator`` for a table of one column whose name contains another separator."""
    (name, *others) = map(str, rows.columns)
    found = next((word for word, character in SEPARATORS.items() if character in name), None)
    return f". Its columns seem to be separated otherwise: set separator = '{found}'" if found and not others else ""


def as_text(column: pd.Series) -> pd.Series:
    """Return `column` as texts, equal for all formats; blank texts count as missing.

    Integers with gaps, which pandas reads as floats, lose their ".0".
    """
    numbers = column.dropna()
    if column.dtype.kind == "f" and ((numbers % 1 == 0) & (numbers.abs() < 2**63)).all():
        column = column.astype("Int64")
    texts = column.astype("string")
    return texts.mask((texts.str.strip() == "").fillna(False))


def codes(column: pd.Series, names: list[str]) -> Tensor:
    """Return (N,) int64: the index of each text in `names`; -1 for a missing one."""
    import pandas as pd

    return torch.from_numpy(pd.Index(names, dtype="string").get_indexer(pd.Index(column)).astype(np.int64))
