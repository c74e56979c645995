"""Encode the tables of a data set with a task: the tensors and facts that the cache keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from copra_fl.config import ConfigError, DataConfig
from copra_fl.data.cache import Stored, cached
from copra_fl.data.held_out import choose_clients, content_hashes, hold_out
from copra_fl.files import digest_of, kept_digest, sha256
from copra_fl.sources.tables import Table, as_text, codes, named_files, read_examples, read_rows
from copra_fl.tasks import Task

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd

#: a label column with more different labels than this number and this share of the rows names the rows
MAX_LABELS, MAX_LABELS_PER_ROW = 20, 0.5
#: Raise it whenever the same inputs would give other cached tensors, held-out sets or partitions.
CACHE_VERSION = 5


def encoding_key(task: Task, data: DataConfig, processor: Any) -> list[Any]:
    """Return all values that decide which tensors a table is encoded to; part of the cache's digest.

    Raises ConfigError for a processor that the task cannot use.
    """
    columns = list(columns_of(task, data).values())
    digest, options = task.processor_digest(processor), task.option_values(data).values()
    separator = [] if data.separator == DataConfig.separator else [data.separator]
    return [task.name, task.version, columns, data.labels, data.max_length, digest, *options, *separator]


def content_digest(task: Task, data: DataConfig, table: Table) -> str:
    """Return the digest of the content of `table` and of the files that its content column names."""
    if not task.names_files or Path(table.where).is_dir():  # the digest of a folder of images is that of its files
        return table.digest
    column = columns_of(task, data)[task.columns[0]]
    kept = digest_of(table.digest, column, data.separator)
    _, facts = cached("files", kept, lambda: ({}, {"files": named_files(table, column)}), table.where)
    files = [file for name in facts["files"] if (file := table.folder / name).is_file()]
    if not files:
        return table.digest
    return digest_of(table.digest, kept_digest(files, lambda: digest_of([sha256(file) for file in files])))


def columns_of(task: Task, data: DataConfig) -> dict[str, str]:
    """Return configuration key -> column for the columns of a table that `task` reads."""
    known = {key: data.value(key) for key in (*task.columns, *task.optional_columns)}
    return {key: column for key, column in known.items() if column or key in task.columns}


def readers_of(task: Task) -> dict[str, Callable[[pd.Series, Path], pd.Series]]:
    """Return the functions with which `read_examples` reads contents, and labels without white space around them."""
    return {"label-column": lambda column, _: as_text(column).str.strip(), task.columns[0]: task.content}


def encode_tables(task: Task, data: DataConfig, processor: Any, train: Table, test: Table | None) -> Stored:
    """Encode all examples of a data set, and assign them to the held-out sets or the pool of the clients.

    Raises ConfigError for tables that lack columns, labels or enough examples.
    """
    import pandas as pd

    columns, readers = columns_of(task, data), readers_of(task)
    rows, dropped_empty = read_examples(train, columns | _client_column(data), readers)
    label_names = _label_names(task, data, train, rows)
    held_out_names: list[str] = []
    if data.held_out_clients:
        rows, held_out_names = choose_clients(data, rows, sort_names(rows["client-column"].unique()))
    num_train = len(rows)
    if test is not None:
        test_rows, dropped = read_examples(test, columns, readers)
        dropped_empty += dropped
        if new := labels_in(task, test_rows) - set(label_names):
            raise ConfigError(
                f"{test.where} has labels that do not occur in {train.where}: {', '.join(sort_names(new))}. "
                f"Labels of the training data: {', '.join(label_names)}"
            )
        rows = pd.concat([rows, test_rows], ignore_index=True)
    is_held_out = np.zeros(len(rows), bool)
    if data.client_column:
        is_held_out = rows["client-column"].isin(held_out_names).to_numpy()
    hashes = content_hashes(task, data, rows)
    subsets, dropped_duplicates = hold_out(data, hashes, num_train, np.flatnonzero(is_held_out))

    tensors = {name: torch.from_numpy(indices) for name, indices in subsets.items()}
    tensors["contents"] = torch.from_numpy(hashes)
    client_names: list[str] = []
    if data.client_column:
        client_names = sort_names(set(rows["client-column"].dropna()) - set(held_out_names))
        tensors["clients"] = codes(rows["client-column"], client_names)
    tensors |= task.encode(rows, label_names, processor, data)
    facts = {
        "label_names": label_names,
        "client_names": client_names,
        "held_out_names": held_out_names,
        "dropped_duplicates": dropped_duplicates,
        "dropped_empty": dropped_empty,
    }
    return tensors, facts


def read_train_rows(task: Task, data: DataConfig, train: Table) -> pd.DataFrame:
    """Return the rows of `train`, with all its columns, in the order in which `encode_tables` encodes them."""
    columns, readers = columns_of(task, data) | _client_column(data), readers_of(task)
    rows = read_rows(train, columns, readers)
    if not data.held_out_clients:
        return rows
    examples, _ = read_examples(train, columns, readers)
    examples["place"] = range(len(examples))
    kept, _ = choose_clients(data, examples, sort_names(examples["client-column"].unique()))
    return rows.iloc[kept["place"]].reset_index(drop=True)


def _client_column(data: DataConfig) -> dict[str, str]:
    return {"client-column": data.client_column} if data.client_column else {}


def _label_names(task: Task, data: DataConfig, train: Table, rows: pd.DataFrame) -> list[str]:
    """Return the labels in order: those of the configuration, or else those of the training data; none without labels.

    Raises ConfigError for a single label, and for labels in the data that the configuration does not list.
    """
    labels = labels_in(task, rows)
    label_names = (data.label_list or sort_names(labels)) if task.labels != "none" else []
    if task.labels == "one" and not data.label_list:
        _refuse_numbers_and_names(data, train, label_names, len(rows))
    if len(label_names) == 1:
        raise ConfigError(
            f"{train.where} has one label only, {label_names[0]!r}, in column {data.label_column!r}; "
            "classification needs at least two"
        )
    if new := labels - set(label_names):
        raise ConfigError(
            f"{train.where} has labels that labels = {data.labels!r} does not list: {', '.join(sort_names(new))}"
        )
    return label_names


def _refuse_numbers_and_names(data: DataConfig, train: Table, labels: list[str], num_rows: int) -> None:
    """Raise ConfigError for labels that are numbers with fractions, or nearly as many as rows: both are no classes."""
    column = f"label-column = {data.label_column!r} of {train.where}"
    remedy = "choose another column, or list all labels in `labels` if they are classes"
    if all(map(is_number, labels)) and (fraction := next((label for label in labels if float(label) % 1), None)):
        raise ConfigError(f"{column} has numbers with fractions, such as {fraction}, which are no classes; {remedy}")
    if len(labels) > max(MAX_LABELS, num_rows * MAX_LABELS_PER_ROW):
        raise ConfigError(f"{column} has {len(labels)} different labels in {num_rows} rows; {remedy}")


def is_number(text: str) -> bool:
    """Return True if `text` is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def labels_in(task: Task, rows: pd.DataFrame) -> set[str]:
    """Return the labels that occur in `rows`; none for a task without labels."""
    if task.labels == "none":
        return set()
    return {label for entry in rows["label-column"].unique() for label in task.labels_of(entry)}


def sort_names(names: Iterable[str]) -> list[str]:
    """Return `names` sorted, by value if all are integers."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d+", name) for name in names) else names
