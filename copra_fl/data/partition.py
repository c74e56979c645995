"""Partition the pool over clients, and split each client's examples into training and validation.

The partitioners are those of flwr-datasets, seeded. Partitions are kept in the cache (`copra_fl.data.federated`).
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copra_fl.config import BY_LABEL, ConfigError, DataConfig
from copra_fl.seeding import derive, generator


def partition(
    data: DataConfig, seed: int, tokens: dict[str, Tensor], natural_names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return ``owner``, (pool,) int32: the client of each example of the pool, -1 for none; and the clients' names.

    `natural_names` are the values of the client column. Raises ConfigError if the data cannot be partitioned as asked.
    """
    from datasets import Dataset

    pool = tokens["pool"].numpy()
    # Partitioners split the table in its own order, which can be one of time or of source.
    order = generator(seed, "partition", "order").permutation(len(pool))
    columns = {"position": order}
    if data.partitioner in BY_LABEL:
        columns["label"] = tokens["labels"].numpy()[pool[order]]
    names = [str(client) for client in range(data.num_clients)]
    if data.partitioner == "natural":
        clients = tokens["clients"].numpy()[pool[order]]
        chosen = largest(clients, natural_names, data.num_clients)
        names = [natural_names[client] for client in chosen]
        kept = np.isin(clients, chosen)
        columns = {name: column[kept] for name, column in columns.items()} | {
            "client": np.searchsorted(chosen, clients[kept])
        }
    partitioner = _make_partitioner(data, derive(seed, "partition"), columns)
    partitioner.dataset = Dataset.from_dict(columns).with_format("arrow")
    owner = np.full(len(pool), -1, np.int32)
    try:
        # Partitioners print progress bars and warnings of unused classes to stderr; we count unassigned examples
        # instead.
        with redirect_stderr(io.StringIO()):
            for number in range(partitioner.num_partitions):
                part = partitioner.load_partition(number)[:]
                client = part["client"][0].as_py() if data.partitioner == "natural" else number
                owner[part["position"].to_numpy()] = client
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"partitioner = {data.partitioner!r} cannot split this data: {reason}") from error
    return {"owner": torch.from_numpy(owner)}, {"client_names": names}


def largest(clients: np.ndarray, names: list[str], number: int) -> np.ndarray:
    """Return the `number` clients with the most examples, in the order of their names; all clients if it is 0.

    `clients` is the client of each example. Raises ConfigError for more clients than `names`.
    """
    if number > len(names):
        raise ConfigError(f"num-clients = {number} is more than the {len(names)} values of the client column")
    counts = np.bincount(clients, minlength=len(names))
    return np.sort(np.argsort(-counts, kind="stable")[: number or len(names)])


def _make_partitioner(data: DataConfig, seed: int, columns: dict[str, np.ndarray]) -> Any:
    """Return the partitioner of flwr-datasets. Raises ConfigError for more clients, classes or shards than exist."""
    from flwr_datasets import partitioner

    clients, per_client, number = data.num_clients, data.classes_per_client, len(columns["position"])
    if clients > number:
        raise ConfigError(f"num-clients = {clients} is more than the {number} examples that are left for clients")
    match data.partitioner:
        case "iid":
            return partitioner.IidPartitioner(clients)
        case "dirichlet":
            return partitioner.DirichletPartitioner(clients, "label", data.alpha, min_partition_size=0, seed=seed)
        case "pathological":
            classes = len(np.unique(columns["label"]))
            if per_client > classes:
                raise ConfigError(f"classes-per-client = {per_client} is more than the {classes} classes of the data")
            return partitioner.PathologicalPartitioner(clients, "label", per_client, "first-deterministic", seed=seed)
        case "shards":
            if clients * per_client > number:
                raise ConfigError(
                    f"num-clients = {clients} with classes-per-client = {per_client} shards is {clients * per_client} "
                    f"shards, more than the {number} examples that are left for clients"
                )
            return partitioner.ShardPartitioner(clients, "label", num_shards_per_partition=per_client, seed=seed)
        case _:
            return partitioner.NaturalIdPartitioner("client")


def split_clients(
    pool: np.ndarray, owner: np.ndarray, num_clients: int, validation_fraction: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the training and validation examples of each client (`split_client`)."""
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(num_clients + 1))
    train, validation = [], []
    for client in range(num_clients):
        indices = pool[order[bounds[client] : bounds[client + 1]]]
        client_train, client_validation = split_client(indices, client, validation_fraction, seed)
        train.append(client_train)
        validation.append(client_validation)
    return train, validation


def split_client(
    indices: np.ndarray, client: int, validation_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split one client's examples `indices` into training and validation. One example is a training example."""
    shuffled = generator(seed, "partition", "client", client).permutation(indices)
    num_validation = int(len(shuffled) * validation_fraction)
    return shuffled[num_validation:], shuffled[:num_validation]


def limit_train(train: np.ndarray, data: DataConfig, labels: np.ndarray | None) -> np.ndarray:
    """Return the examples of the shuffled `train` that ``shots`` and ``client-examples`` keep, in the same order.

    They are the first ones of each label, then the first ones: a larger limit keeps all that a smaller one keeps.
    `labels` is the label of every example; it is read for ``shots`` only.
    """
    if data.shots:
        assert labels is not None, "shots need one label per example"
        classes = labels[train]
        by_class = np.argsort(classes, kind="stable")
        place_in_class = np.arange(len(train)) - np.searchsorted(classes[by_class], classes[by_class])
        train = train[np.sort(by_class[place_in_class < data.shots])]
    return train[: data.client_examples or None]
