"""Partition the pool over clients, and split each client's examples into training and validation.

By label the partitioners are those of flwr-datasets, seeded. ``iid`` and ``natural`` deal out as theirs do, in one
operation for all clients, since theirs read one client after another (``natural``: the whole table for each). Plugins
(`copra_fl.plugins`) are each a `Partitioner`. Partitions are kept in the cache (`copra_fl.data.federated`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copra_fl import plugins
from copra_fl.config import ConfigError, DataConfig
from copra_fl.seeding import derive, generator


@dataclass(frozen=True)
class Pool:
    """The examples that a partitioner of your own deals out to clients: N examples, in the order of the table.

    Attributes:
        size: N.
        num_clients: number of clients.
        labels: (N,) int64 the index of each example's label; None for a task without one label per example.
        groups: (N,) int64 the index of each example's value of ``client-column``, -1 without a value; None without a
            client column.
        group_names: the values of the client column, in order.
        data: the settings of the run's data.
        rng: generator of the run's seed; draw from no other.
    """

    size: int
    num_clients: int
    labels: np.ndarray | None
    groups: np.ndarray | None
    group_names: list[str]
    data: DataConfig
    rng: np.random.Generator


@dataclass(frozen=True)
class Partitioner:
    """A partitioner of your own: a plugin, which ``partitioner`` names by its place.

    Attributes:
        assign: pool -> (N,) int the client of each example, from 0; -1: no client has it.
        needs_labels: it splits examples by label, so the task must have one label per example.
        needs_groups: it needs ``client-column``.
    """

    assign: Callable[[Pool], np.ndarray]
    needs_labels: bool = False
    needs_groups: bool = False


def partition(
    data: DataConfig, seed: int, tokens: dict[str, Tensor], natural_names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return ``owner``, (pool,) int32: the client of each example of the pool, -1 for none; and the clients' names.

    `natural_names` are the values of the client column. Raises ConfigError if the data cannot be partitioned as asked.
    """
    pool = tokens["pool"].numpy()
    names = [str(client) for client in range(data.num_clients)]
    if plugins.PARTITIONER.place(data.partitioner):
        owner = _assign(data, seed, pool, tokens, natural_names)
    elif data.num_clients > len(pool):
        raise ConfigError(
            f"num-clients = {data.num_clients} is more than the {len(pool)} examples that are left for clients"
        )
    elif data.partitioner == "natural":
        clients = tokens["clients"].numpy()[pool]
        chosen = largest(clients, natural_names, data.num_clients)
        owner = np.where(np.isin(clients, chosen), np.searchsorted(chosen, clients), -1)
        names = [natural_names[client] for client in chosen]
    else:
        # Partitioners split the table in its own order, which can be one of time or of source.
        order = generator(seed, "partition", "order").permutation(len(pool))
        if data.partitioner == "iid":
            owner = np.empty(len(pool), int)
            owner[order] = _equal_parts(len(pool), data.num_clients)
        else:
            owner = _by_label(data, derive(seed, "partition"), order, tokens["labels"].numpy()[pool[order]])
    return {"owner": torch.from_numpy(owner.astype(np.int32))}, {"client_names": names}


def _equal_parts(size: int, num_clients: int) -> np.ndarray:
    """Return (size,) int: the client of each position, with consecutive parts that differ by one example at most."""
    smallest, num_larger = divmod(size, num_clients)
    clients = np.arange(num_clients)
    return np.repeat(clients, smallest + (clients < num_larger))


def _by_label(data: DataConfig, seed: int, order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (pool,) int: the client of each position of the pool, -1 for none, by a partitioner of flwr-datasets.

    `order` are the positions in the order in which they are split, `labels` their labels. Raises ConfigError if the
    data cannot be split as asked.
    """
    from datasets import Dataset

    partitioner = _make_partitioner(data, seed, labels)
    partitioner.dataset = Dataset.from_dict({"position": order, "label": labels}).with_format("arrow")
    owner = np.full(len(order), -1)
    try:
        # Partitioners print progress bars and warnings of unused classes to stderr; we count unassigned examples
        # instead.
        with redirect_stderr(io.StringIO()):
            for number in range(partitioner.num_partitions):
                owner[partitioner.load_partition(number)[:]["position"].to_numpy()] = number
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"partitioner = {data.partitioner!r} cannot split this data: {reason}") from error
    return owner


def _assign(
    data: DataConfig, seed: int, pool: np.ndarray, tokens: dict[str, Tensor], group_names: list[str]
) -> np.ndarray:
    """Return (pool,) int: the client that a plugin assigns each example of the pool to.

    Raises ConfigError for a plugin that is missing, that lacks what it needs, or that returns anything else.
    """
    it = f"partitioner = {data.partitioner!r}"
    partitioner: Partitioner = plugins.PARTITIONER.find(data.partitioner, Partitioner)
    labels, groups = (tokens[name].numpy()[pool] if name in tokens else None for name in ("labels", "clients"))
    if labels is not None and labels.ndim > 1:
        labels = None
    if partitioner.needs_labels and labels is None:
        raise ConfigError(f"{it} splits examples by label, but the task does not have exactly one label per example")
    if partitioner.needs_groups and groups is None:
        raise ConfigError(f"{it} needs client-column: the name of a column of the table")
    rng = generator(seed, "partition", "plugin")
    owner = np.asarray(partitioner.assign(Pool(len(pool), data.num_clients, labels, groups, group_names, data, rng)))
    is_valid = owner.shape == (len(pool),) and owner.dtype.kind in "iu"
    if not is_valid or owner.min(initial=0) < -1 or owner.max(initial=-1) >= data.num_clients:
        shown = f"values from {owner.min()} to {owner.max()}" if is_valid else f"{owner.dtype} of shape {owner.shape}"
        raise ConfigError(
            f"{it} returned {shown}; it must return a whole number for each of the {len(pool)} examples: the client, "
            f"0 to {data.num_clients - 1}, or -1 for no client"
        )
    return owner


def largest(clients: np.ndarray, names: list[str], number: int) -> np.ndarray:
    """Return the `number` clients with the most examples, in the order of their names; all clients if it is 0.

    `clients` is the client of each example. Raises ConfigError for more clients than `names`.
    """
    if number > len(names):
        raise ConfigError(f"num-clients = {number} is more than the {len(names)} values of the client column")
    counts = np.bincount(clients, minlength=len(names))
    return np.sort(np.argsort(-counts, kind="stable")[: number or len(names)])


def _make_partitioner(data: DataConfig, seed: int, labels: np.ndarray) -> Any:
    """Return the partitioner of flwr-datasets. Raises ConfigError for more classes or shards than exist."""
    from flwr_datasets import partitioner

    clients, per_client, number = data.num_clients, data.classes_per_client, len(labels)
    match data.partitioner:
        case "dirichlet":
            return partitioner.DirichletPartitioner(clients, "label", data.alpha, min_partition_size=0, seed=seed)
        case "pathological":
            classes = len(np.unique(labels))
            if per_client > classes:
                raise ConfigError(f"classes-per-client = {per_client} is more than the {classes} classes of the data")
            return partitioner.PathologicalPartitioner(clients, "label", per_client, "first-deterministic", seed=seed)
        case _:
            if clients * per_client > number:
                raise ConfigError(
                    f"num-clients = {clients} with classes-per-client = {per_client} shards is {clients * per_client} "
                    f"shards, more than the {number} examples that are left for clients"
                )
            return partitioner.ShardPartitioner(clients, "label", num_shards_per_partition=per_client, seed=seed)


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
