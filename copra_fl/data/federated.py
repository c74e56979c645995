"""From a table of examples to tensors: what each client holds, what the server holds out.

    table  ->  test | server validation | pool        fixed by the data alone, never by the seed
               held_out: clients that are held out whole, where they are wanted; then all is cut to chosen clients
    pool   ->  client 0 | client 1 | ...              by a partitioner of flwr-datasets, seeded
    client ->  train | validation                     shuffled, seeded

Several data sets are each loaded like that, as if it were the only one, and then joined (`several`).
With ``partitioner = own`` the table is the server's, all of it held out, and clients have their own (`own_data`).

The held-out sets are the same for every seed, so that what is tuned on validation data with one seed was never test
data with another. What a task makes of the examples, and partitions, are computed once, by one process, and kept in the
cache; from then on `load` maps them into memory and imports none of the libraries that made them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from copra_fl.config import Config, ConfigError, DataConfig
from copra_fl.data.cache import Stored, cached
from copra_fl.data.multi import DataSet, JoinedExamples, deal, in_turn
from copra_fl.data.partition import largest, partition, split_clients
from copra_fl.files import digest_of
from copra_fl.seeding import generator
from copra_fl.sources.tables import Table, called, codes, find_tables, read_examples
from copra_fl.tasks import Examples, Task, find_task

if TYPE_CHECKING:  # slow to import, and needed only where the cache is empty
    import pandas as pd

#: Changes whenever the same inputs would give other held-out sets or partitions.
CACHE_VERSION = 3
HELD_OUT_ROOT = 0
#: what the cache keeps beside what a task has made of the examples
SUBSETS = {"test", "held_out", "server_validation", "pool", "clients"}


@dataclass(frozen=True)
class FederatedData:
    """A data set in a federation. Subsets are int64 arrays of indices into `examples`; no two overlap.

    Attributes:
        label_names: name of each label, in order; empty for a task without.
        client_names: value of the client column where that decides, else the client's number.
        train: what each client trains on.
        validation: what each client keeps for validation; none for a client with too few examples for its share.
        server_validation, test: what no client sees, nor any example equal to one that a client holds.
        held_out: the same of the `held_out_names`, whose examples no client holds.
        held_out_names: values of the client column that are held out whole.
        skipped: clients without training examples. They keep their numbers.
        unassigned: examples that the partitioner gave to no client.
        dropped_duplicates: held-out examples dropped since an equal one is also in the pool (test, held_out: or in
            validation).
        dropped_empty: rows dropped since content, label or client is missing.
        digest: names content, encoding, held-out sets and partition; equal on every machine that has the same.
        tokens_digest: the same without the partition.
        datasets: the data sets, where there are several.
    """

    examples: Examples
    label_names: list[str]
    client_names: list[str]
    train: list[np.ndarray]
    validation: list[np.ndarray]
    server_validation: np.ndarray
    test: np.ndarray
    skipped: list[int]
    unassigned: int
    dropped_duplicates: int
    dropped_empty: int
    digest: str
    tokens_digest: str
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    held_out_names: list[str] = field(default_factory=list)
    datasets: list[DataSet] = field(default_factory=list)

    @property
    def head_sizes(self) -> list[int]:
        """Rows of the head that each data set has; none where there is one data set."""
        return [len(dataset.labels) for dataset in self.datasets]

    def dataset_of(self, client: int) -> int | None:
        """Which of `datasets` the client has; None where there is one data set."""
        return next((number for number, dataset in enumerate(self.datasets) if client in dataset.clients), None)

    def among(self, indices: np.ndarray, numbers: Collection[int | None]) -> np.ndarray:
        """Those of `indices` that are of one of these `datasets`; all of them where there is one data set."""
        parts = [self.datasets[number].among(indices) for number in sorted({n for n in numbers if n is not None})]
        return np.concatenate(parts) if parts else indices


def load_data(config: Config, processor: Any) -> FederatedData:
    """The data of `config`, encoded by its task with `processor`, partitioned by the run's seed.

    The first call does the work and fills the cache; calls in other processes wait for it and then only read.
    ``num-clients`` must be known, except for ``partitioner = natural``, where 0 means every value of the client column,
    and for ``own``, where it does not matter: there are no clients' examples here.

    Raises ConfigError where data, columns or the wanted split cannot be had, AssetError where an asset cannot.
    """
    data, task = config.data, find_task(config.model.task)
    is_known = data.num_clients or data.partitioner in ("natural", "own")
    assert is_known, "num-clients = 0 is for the caller to resolve"
    names = [called(dataset) for dataset in data.datasets]
    if len(set(names)) < len(names):
        raise ConfigError(f"dataset = {data.dataset!r}: data sets must have different names, not {', '.join(names)}")
    if not data.dataset:
        task.processor_digest(processor)
        return _nothing(task, data, processor)
    shares = deal(data.num_clients, len(data.datasets))
    loaded, encoded = {}, []
    for source, clients in zip(data.datasets, shares, strict=True):
        alone = replace(data, dataset=source, num_clients=clients)
        try:
            found, tensors = _load(task, alone, config.federation.seed, processor)
        except ConfigError as error:
            if len(shares) == 1:
                raise
            raise ConfigError(f"dataset {source!r}: {error}") from error
        loaded[called(source)] = found
        encoded.append(tensors)
    if len(loaded) == 1:
        return found
    labels = in_turn([len(each.label_names) for each in loaded.values()])
    for tensors, own in zip(encoded, labels, strict=True):
        tensors["labels"] = tensors["labels"] + own.start
    examples = task.examples(task.join(encoded), processor, data)
    return _joined(JoinedExamples.of(examples, labels), loaded, labels)


def _joined(examples: Examples, loaded: Mapping[str, FederatedData], labels: Sequence[range]) -> FederatedData:
    """The data sets in `loaded`, by name, as one federation's."""
    names, parts = list(loaded), list(loaded.values())
    indices = in_turn([len(each.examples) for each in parts])
    clients = in_turn([len(each.train) for each in parts])
    datasets = [DataSet(*each) for each in zip(names, labels, indices, clients, strict=True)]

    def held(kind: str) -> np.ndarray:
        return np.concatenate([getattr(each, kind) + own.start for each, own in zip(parts, indices, strict=True)])

    def each_client(kind: str) -> list[np.ndarray]:
        pairs = zip(parts, indices, strict=True)
        return [subset + own.start for each, own in pairs for subset in getattr(each, kind)]

    return FederatedData(
        examples=examples,
        label_names=[f"{name}/{label}" for name, each in loaded.items() for label in each.label_names],
        client_names=[f"{name}/{client}" for name, each in loaded.items() for client in each.client_names],
        train=each_client("train"),
        validation=each_client("validation"),
        server_validation=held("server_validation"),
        test=held("test"),
        skipped=[own.start + client for each, own in zip(parts, clients, strict=True) for client in each.skipped],
        unassigned=sum(each.unassigned for each in parts),
        dropped_duplicates=sum(each.dropped_duplicates for each in parts),
        dropped_empty=sum(each.dropped_empty for each in parts),
        digest=digest_of(names, [each.digest for each in parts]),
        tokens_digest=digest_of(names, [each.tokens_digest for each in parts]),
        datasets=datasets,
    )


def _load(task: Task, data: DataConfig, seed: int, processor: Any) -> tuple[FederatedData, dict[str, Tensor]]:
    """One data set, and what its task has made of it."""
    encoding = encoding_of(task, data, processor)
    train, test = find_tables(data)
    content = (train.digest, test.digest if test else None)
    sizes = (data.server_validation_examples, data.test_examples)
    whole = (data.num_clients, data.held_out_clients) if data.held_out_clients else ()
    own = data.partitioner == "own"
    tokens_digest = digest_of(CACHE_VERSION, content, encoding, data.client_column, sizes, whole, own)
    tokens, facts = cached("tokens", tokens_digest, lambda: _encode(task, data, processor, train, test))
    everything = FederatedData(
        examples=task.examples(tokens, processor, data),
        label_names=facts["label_names"],
        client_names=[],
        train=[],
        validation=[],
        server_validation=tokens["server_validation"].numpy(),
        test=tokens["test"].numpy(),
        skipped=[],
        unassigned=0,
        dropped_duplicates=facts["dropped_duplicates"],
        dropped_empty=facts["dropped_empty"],
        digest=tokens_digest,
        tokens_digest=tokens_digest,
        held_out=tokens["held_out"].numpy(),
        held_out_names=facts["held_out_names"],
    )
    encoded = {name: tensor for name, tensor in tokens.items() if name not in SUBSETS}
    if own:
        return everything, encoded
    split = (data.partitioner, data.alpha, data.classes_per_client, data.num_clients, data.validation_fraction)
    digest = digest_of(tokens_digest, split, seed)
    dealt, owners = cached("partitions", digest, lambda: partition(data, seed, tokens, facts["client_names"]))

    pool, client_names = tokens["pool"].numpy(), owners["client_names"]
    train_sets, validation_sets = split_clients(
        pool, dealt["owner"].numpy(), len(client_names), data.validation_fraction, seed
    )
    skipped = [client for client, indices in enumerate(train_sets) if not len(indices)]
    if skipped and data.empty_clients == "refuse":
        names = ", ".join(client_names[client] for client in skipped)
        raise ConfigError(f"empty-clients = 'refuse', and these clients have no training examples: {names}")
    federated = replace(
        everything,
        client_names=client_names,
        train=train_sets,
        validation=validation_sets,
        skipped=skipped,
        unassigned=int((dealt["owner"] < 0).sum()),
        digest=digest,
    )
    return federated, encoded


def encoding_of(task: Task, data: DataConfig, processor: Any) -> list[Any]:
    """All that decides what tensors a table gives. Raises ConfigError for a processor that cannot be used."""
    columns = list(columns_of(task, data).values())
    return [task.name, task.version, columns, data.labels, data.max_length, task.processor_digest(processor)]


def columns_of(task: Task, data: DataConfig) -> dict[str, str]:
    """Configuration key -> column for what `task` reads of a table."""
    known = {key: getattr(data, key.replace("-", "_")) for key in (*task.columns, *task.optional_columns)}
    return {key: column for key, column in known.items() if column or key in task.columns}


def _nothing(task: Task, data: DataConfig, processor: Any) -> FederatedData:
    """The data of a server that has none: labels alone."""
    import pandas as pd

    rows = pd.DataFrame({key: pd.Series(dtype="string") for key in columns_of(task, data)})
    examples = task.examples(task.encode(rows, data.label_list, processor, data), processor, data)
    nobody, digest = np.zeros(0, int), digest_of(data.labels)
    return FederatedData(examples, data.label_list, [], [], [], nobody, nobody, [], 0, 0, 0, digest, digest)


def _encode(task: Task, data: DataConfig, processor: Any, train: Table, test: Table | None) -> Stored:
    """What the cache keeps of a data set: what the task makes of all examples, their clients, and who sees which."""
    import pandas as pd

    columns, content = columns_of(task, data), task.columns[0]
    own = {"client-column": data.client_column} if data.client_column else {}
    rows, dropped_empty = read_examples(train, columns | own, {content: task.content})
    there = labels_in(task, rows)
    label_names = (data.label_list or _in_order(there)) if task.labels != "none" else []
    if len(label_names) == 1:
        raise ConfigError(
            f"{train.where} has one label only, {label_names[0]!r}, in {data.label_column!r}: there is nothing to learn"
        )
    if new := there - set(label_names):
        raise ConfigError(
            f"{train.where} has labels that are not in labels = {data.labels!r}: {', '.join(_in_order(new))}"
        )
    held_out_names: list[str] = []
    if data.held_out_clients:
        rows, held_out_names = _choose_clients(data, rows)
    num_train = len(rows)
    if test is not None:
        test_rows, dropped = read_examples(test, columns, {content: task.content})
        dropped_empty += dropped
        if new := labels_in(task, test_rows) - set(label_names):
            raise ConfigError(
                f"{test.where} has labels that {train.where} has not: {', '.join(_in_order(new))}. "
                f"Labels there: {', '.join(label_names)}"
            )
        rows = pd.concat([rows, test_rows], ignore_index=True)
    of_held_out = rows["client-column"].isin(held_out_names).to_numpy() if own else np.zeros(len(rows), bool)
    subsets, dropped_duplicates = _hold_out(data, rows[content], num_train, np.flatnonzero(of_held_out))

    tensors = {name: torch.from_numpy(indices) for name, indices in subsets.items()}
    client_names: list[str] = []
    if own:
        client_names = _in_order(set(rows["client-column"].dropna()) - set(held_out_names))
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


def labels_in(task: Task, rows: pd.DataFrame) -> set[str]:
    """The labels that `rows` have; none for a task without."""
    if task.labels == "none":
        return set()
    return {label for entry in rows["label-column"].unique() for label in task.labels_of(entry)}


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted, by value where all are whole numbers."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d+", name) for name in names) else names


def _choose_clients(data: DataConfig, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the ``num-clients + held-out-clients`` clients with the most, and which of these are the unseen.

    With ``num-clients = 0`` of all clients. Which are held out is drawn, by the data alone.
    """
    names = _in_order(rows["client-column"].unique())
    if max(1, data.num_clients) + data.held_out_clients > len(names):
        raise ConfigError(
            f"num-clients = {data.num_clients} and held-out-clients = {data.held_out_clients} need more than the "
            f"{len(names)} values of the client column"
        )
    wanted = data.num_clients and data.num_clients + data.held_out_clients
    chosen = [names[client] for client in largest(codes(rows["client-column"], names).numpy(), names, wanted)]
    drawn = generator(HELD_OUT_ROOT, "unseen-clients").permutation(len(chosen))[: data.held_out_clients]
    kept = rows[rows["client-column"].isin(chosen)].reset_index(drop=True)
    return kept, [chosen[client] for client in np.sort(drawn)]


def _hold_out(
    data: DataConfig, contents: pd.Series, num_train: int, of_held_out: np.ndarray
) -> tuple[dict[str, np.ndarray], int]:
    """Indices of ``test``, ``server_validation``, ``held_out`` and ``pool``, and how many duplicates were dropped.

    `contents` are those of `num_train` training examples and then of the test set, if the data has its own.
    `of_held_out` are the examples of clients that are held out whole.
    """
    test = np.arange(num_train, len(contents))
    carve_test = 0 if len(test) else data.test_examples
    carved = carve_test + data.server_validation_examples
    own = data.partitioner == "own"
    seen = np.setdiff1d(np.arange(num_train), of_held_out)
    if carved > len(seen) or (2 * carved > len(seen) and not own):
        wanted = [f"test-examples = {carve_test}"] if carve_test else []
        wanted.append(f"server-validation-examples = {data.server_validation_examples}")
        raise ConfigError(
            f"{' and '.join(wanted)} would take {carved} of {len(seen)} examples"
            + ("" if own else " from the clients; at most half may go")
        )
    order = generator(HELD_OUT_ROOT, "held-out").permutation(seen)
    if carve_test:
        test = order[:carve_test]
    validation, pool = order[carve_test:carved], order[carved:carved] if own else order[carved:]
    held_out_test = generator(HELD_OUT_ROOT, "unseen").permutation(of_held_out)[: data.test_examples]
    held_out = {"test": test, "held_out": held_out_test, "server_validation": validation}
    subsets, dropped = {"pool": pool}, 0
    for name, indices in held_out.items():
        others = pool if name == "server_validation" else np.concatenate([validation, pool])
        subsets[name] = indices[~contents.iloc[indices].isin(contents.iloc[others]).to_numpy()]
        dropped += len(indices) - len(subsets[name])
        if len(indices) and not len(subsets[name]):
            called = {
                "test": "test set",
                "held_out": "held-out clients",
                "server_validation": "server's validation set",
            }
            raise ConfigError(f"nothing is left of the {called[name]}: all of it is also among the other examples")
    return {name: np.sort(indices) for name, indices in subsets.items()}, dropped
