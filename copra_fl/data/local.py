"""Load the data of a node, which make it one client: a CSV, TSV, JSONL or Parquet file, or a folder of images.

    file  ->  client's train | validation        encoded in the node's cache, readable by its owner only

Only the number of examples leaves the node. A file that cannot be used raises a `TableError`, whose public message
names settings of the run and counts, never a column, a label or a text of the file.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from copra_fl.config import Config, DataConfig
from copra_fl.data.cache import Stored, cached
from copra_fl.data.encoding import CACHE_VERSION, columns_of, content_digest, encoding_key, read_train_rows, readers_of
from copra_fl.data.federated import Dropped, FederatedData
from copra_fl.data.held_out import content_hashes, without_equal
from copra_fl.data.partition import limit_train, split_client
from copra_fl.files import digest_of
from copra_fl.sources.tables import Table, TableError, file_table, read_examples
from copra_fl.tasks import Task, find_task


def load_local_data(config: Config, processor: Any, path: str, client: int, num_clients: int) -> FederatedData:
    """Load the file `path` as the examples of `client`; the other of `num_clients` clients have none here.

    For a task with labels ``labels`` must be resolved: the server fills it in. Raises TableError for a file that cannot
    be used, ConfigError as `load_data` does.
    """
    data, seed, task = config.data, config.federation.seed, find_task(config.model.task)
    assert data.labels or task.labels == "none", "labels = '' must be resolved by the server"
    table = file_table("data-path", Path(path), data.separator)
    digest = digest_of(CACHE_VERSION, "own", content_digest(task, data, table), encoding_key(task, data, processor))
    tokens, facts = cached("tokens", digest, lambda: _encode(task, data, processor, table), table.where)
    examples = task.examples(tokens, processor, data)
    indices = np.arange(len(examples))
    nobody = [indices[:0]] * num_clients
    unlimited, candidates = split_client(indices, client, data.validation_fraction, seed)
    train = limit_train(unlimited, data, tokens["labels"].numpy() if task.labels == "one" else None)
    validation = without_equal(tokens["contents"].numpy(), candidates, train)
    return FederatedData(
        examples=examples,
        label_names=data.label_list,
        client_names=[str(number) for number in range(num_clients)],
        train=[*nobody[:client], train, *nobody[client + 1 :]],
        validation=[*nobody[:client], validation, *nobody[client + 1 :]],
        dropped=Dropped(
            trained=len(candidates) - len(validation),
            empty=facts["dropped_empty"],
            limited=len(unlimited) - len(train),
        ),
        digest=digest,
        tokens_digest=digest,
        read_rows=partial(read_train_rows, task, replace(data, client_column=""), table),
    )


def _encode(task: Task, data: DataConfig, processor: Any, table: Table) -> Stored:
    """Encode the examples of the file. Raises TableError for labels that are not in ``labels``."""
    rows, num_dropped = read_examples(table, columns_of(task, data), readers_of(task))
    if task.labels != "none":
        entries, known = rows["label-column"], set(data.label_list)
        new = entries[[not known.issuperset(task.labels_of(entry)) for entry in entries]]
        if len(new):
            reason = f"{len(new)} of {len(rows)} examples have a label that is none of {', '.join(data.label_list)}"
            raise TableError(f"{table.where}: {reason}: {', '.join(map(repr, new.unique()[:5]))}", reason)
    tensors = task.encode(rows, data.label_list, processor, data)
    tensors["contents"] = torch.from_numpy(content_hashes(task, data, rows))
    return tensors, {"dropped_empty": num_dropped}
