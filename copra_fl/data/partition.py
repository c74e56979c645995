"""Who gets which examples: the pool dealt out to clients, and each client's own cut into training and validation.

By a partitioner of flwr-datasets, seeded. What a partitioner makes is kept in the cache (`copra_fl.data.federated`).
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
    """``owner``, (pool,) int32: the client of each example of the pool, -1 for none; and the clients' names."""
    from datasets import Dataset

    pool = tokens["pool"].numpy()
    # Partitioners cut the table in its own order, which can be one of time or of source.
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
        # One of them draws a progress bar, another warns of classes nobody has: those are counted as unassigned.
        with redirect_stderr(io.StringIO()):
            for number in range(partitioner.num_partitions):
                part = partitioner.load_partition(number)[:]
                client = part["client"][0].as_py() if data.partitioner == "natural" else number
                owner[part["position"].to_numpy()] = client
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"partitioner = {data.partitioner!r} cannot split this data: {reason}") from error
    return {"owner": torch.from_numpy(owner)}, {"client_names": names}


def largest(clients: np.ndarray, names: list[str], wanted: int) -> np.ndarray:
    """The `wanted` clients with the most examples, in the order of their names; all for 0."""
    if wanted > len(names):
        raise ConfigError(f"num-clients = {wanted} is more than the {len(names)} values of the client column")
    counts = np.bincount(clients, minlength=len(names))
    return np.sort(np.argsort(-counts, kind="stable")[: wanted or len(names)])


def _make_partitioner(data: DataConfig, seed: int, columns: dict[str, np.ndarray]) -> Any:
    """The partitioner of flwr-datasets. Raises ConfigError for more clients, classes or shards than there are."""
    from flwr_datasets import partitioner

    clients, each, number = data.num_clients, data.classes_per_client, len(columns["position"])
    if clients > number:
        raise ConfigError(f"num-clients = {clients} is more than the {number} examples that are left for clients")
    match data.partitioner:
        case "iid":
            return partitioner.IidPartitioner(clients)
        case "dirichlet":
            return partitioner.DirichletPartitioner(clients, "label", data.alpha, min_partition_size=0, seed=seed)
        case "pathological":
            classes = len(np.unique(columns["label"]))
            if each > classes:
                raise ConfigError(f"classes-per-client = {each} is more than the {classes} classes of the data")
            return partitioner.PathologicalPartitioner(clients, "label", each, "first-deterministic", seed=seed)
        case "shards":
            if clients * each > number:
                raise ConfigError(
                    f"num-clients = {clients} with classes-per-client = {each} shards is {clients * each} shards, "
                    f"more than the {number} examples that are left for clients"
                )
            return partitioner.ShardPartitioner(clients, "label", num_shards_per_partition=each, seed=seed)
        case _:
            return partitioner.NaturalIdPartitioner("client")


def split_clients(
    pool: np.ndarray, owner: np.ndarray, num_clients: int, validation_fraction: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`split_client` of each client; who has an example at all has one to train on."""
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(num_clients + 1))
    train, validation = [], []
    for client in range(num_clients):
        own, held = split_client(pool[order[bounds[client] : bounds[client + 1]]], client, validation_fraction, seed)
        train.append(own)
        validation.append(held)
    return train, validation


def split_client(
    indices: np.ndarray, client: int, validation_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train and validation part of the examples `indices` of one client."""
    shuffled = generator(seed, "partition", "client", client).permutation(indices)
    held = int(len(shuffled) * validation_fraction)
    return shuffled[held:], shuffled[:held]
