"""Load a federation's data: the tensors of all examples, the clients' subsets and the held-out sets.

    table  ->  test | server validation | pool        by the data alone, never by the seed (`held_out`)
               held_out: clients that are held out whole, with held-out-clients
    pool   ->  client 0 | client 1 | ...              by a partitioner, of flwr-datasets or a plugin's (`partition`)
    client ->  train | validation                     shuffled, seeded; then train is cut by client-examples and shots,
                                                      and no validation example equals a training example of any client

Of several data sets, each is loaded as if it were alone; then they are joined (`multi`).
With ``partitioner = own`` the table is the server's and is held out entirely; clients load their own files (`local`).

Encoded examples and partitions are computed once, by one process, and kept in the cache; from then on `load_data` maps
them into memory and imports none of the libraries that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from copra_fl import plugins
from copra_fl.config import Config, ConfigError, DataConfig, FederationConfig
from copra_fl.data.cache import Stored, cached
from copra_fl.data.encoding import (
    CACHE_VERSION,
    columns_of,
    content_digest,
    encode_tables,
    encoding_key,
    read_train_rows,
)
from copra_fl.data.held_out import without_equal, without_trained
from copra_fl.data.multi import DatasetRanges, MultiDatasetExamples, consecutive_ranges, split_evenly
from copra_fl.data.partition import limit_train, partition, split_clients
from copra_fl.files import digest_of
from copra_fl.sources.tables import dataset_name, find_tables
from copra_fl.tasks import Examples, Task, find_task
from copra_fl.wording import listed

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd

#: tensors of the cache that are not the task's encoding of the examples: subsets, clients, hashes of contents
NOT_ENCODED = {"test", "held_out", "server_validation", "pool", "clients", "contents"}


def _no_indices() -> np.ndarray:
    return np.zeros(0, int)


@dataclass(frozen=True)
class Dropped:
    """Numbers of examples that are not used.

    Attributes:
        unassigned: examples that the partitioner gave to no client.
        duplicates: held-out examples with an equal one in the pool; of test and held_out also in server_validation.
        trained: clients' validation examples with an equal training example.
        empty: rows without content, label or client.
        limited: clients' examples that are neither training nor validation examples, by client-examples and shots.
    """

    unassigned: int = 0
    duplicates: int = 0
    trained: int = 0
    empty: int = 0
    limited: int = 0

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, kw_only=True)
class FederatedData:
    """The data of a federation. Subsets are int64 arrays of indices into `examples`; no two overlap.

    Attributes:
        examples: all examples, encoded.
        label_names: name of each label, in order; empty for a task without labels.
        client_names: values of the client column with ``partitioner = natural``, else the clients' numbers.
        train: training examples of each client.
        validation: validation examples of each client, none of which equals a training example of any client; none
            for a client with too few examples.
        server_validation, test: held-out examples; no client has an equal one.
        held_out: test examples of the clients `held_out_names`; no other client has an equal one.
        held_out_names: values of the client column whose clients are held out whole.
        skipped: clients without training examples. They keep their numbers.
        dropped: numbers of examples that are not used.
        digest: digest of content, encoding, held-out sets and partition; equal on all machines with the same data.
        tokens_digest: the same without the partition.
        datasets: ranges of each data set, if there are several; else empty.
        read_rows: return the rows of the table that the clients' examples were encoded from, in their order; None
            with several data sets and on a server without data.
    """

    examples: Examples
    label_names: list[str]
    digest: str
    tokens_digest: str
    client_names: list[str] = field(default_factory=list)
    train: list[np.ndarray] = field(default_factory=list)
    validation: list[np.ndarray] = field(default_factory=list)
    server_validation: np.ndarray = field(default_factory=_no_indices)
    test: np.ndarray = field(default_factory=_no_indices)
    held_out: np.ndarray = field(default_factory=_no_indices)
    held_out_names: list[str] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    dropped: Dropped = Dropped()
    datasets: list[DatasetRanges] = field(default_factory=list)
    read_rows: Callable[[], pd.DataFrame] | None = None

    @property
    def head_sizes(self) -> list[int]:
        """Number of the head's rows for each data set; empty with one data set."""
        return [len(dataset.labels) for dataset in self.datasets]

    def dataset_of(self, client: int) -> int | None:
        """Return the index into `datasets` of the client's data set; None with one data set."""
        return next((number for number, dataset in enumerate(self.datasets) if client in dataset.clients), None)

    def among(self, indices: np.ndarray, numbers: Collection[int | None]) -> np.ndarray:
        """Return those of `indices` that belong to the data sets `numbers`; all of them with one data set."""
        parts = [self.datasets[number].among(indices) for number in sorted({n for n in numbers if n is not None})]
        return np.concatenate(parts) if parts else indices


def without_training(config: Config) -> Config:
    """Return the configuration with the settings that the data depend on."""
    return Config(config.data, config.model, federation=FederationConfig(seed=config.federation.seed))


def load_data(config: Config, processor: Any) -> FederatedData:
    """Load the data of `config`, encoded by its task with `processor` and partitioned by the run's seed.

    The first call computes and fills the cache; calls in other processes wait for it and then only read.
    ``num-clients`` must be resolved, except for ``partitioner = natural``, where 0 means all values of the client
    column, and for ``own``, where clients load their own data.

    Raises ConfigError for data, columns or a split that are missing or impossible, AssetError for an asset that cannot
    be fetched.
    """
    data, task = config.data, find_task(config.model.task)
    is_resolved = data.num_clients or data.partitioner in ("natural", "own")
    assert is_resolved, "num-clients = 0 must be resolved by the caller"
    names = [dataset_name(dataset) for dataset in data.datasets]
    if len(set(names)) < len(names):
        raise ConfigError(f"dataset = {data.dataset!r}: data sets must have different names, not {', '.join(names)}")
    if not data.dataset:
        return _empty(task, data, processor)
    shares = split_evenly(data.num_clients, len(data.datasets))
    loaded, encoded, contents = {}, [], []
    for source, num_clients in zip(data.datasets, shares, strict=True):
        alone = replace(data, dataset=source, num_clients=num_clients)
        try:
            federated, tensors, hashes = _load(task, alone, config.federation.seed, processor)
        except ConfigError as error:
            if len(shares) == 1:
                raise
            raise ConfigError(f"dataset {source!r}: {error}") from error
        loaded[dataset_name(source)] = federated
        encoded.append(tensors)
        contents.append(hashes)
    if len(loaded) == 1:
        return federated
    labels = consecutive_ranges([len(part.label_names) for part in loaded.values()])
    for tensors, dataset_labels in zip(encoded, labels, strict=True):
        tensors["labels"] = tensors["labels"] + dataset_labels.start
    examples = task.examples(task.join(encoded), processor, data)
    return _join(MultiDatasetExamples.of(examples, labels), loaded, labels, np.concatenate(contents))


def _join(
    examples: Examples, loaded: Mapping[str, FederatedData], labels: Sequence[range], contents: np.ndarray
) -> FederatedData:
    """Join the data sets `loaded`, by name, to the data of one federation.

    `contents` has the hash of each example's content: an example that is held out of one data set can also be in
    another one, and is dropped then.
    """
    names, parts = list(loaded), list(loaded.values())
    indices = consecutive_ranges([len(part.examples) for part in parts])
    clients = consecutive_ranges([len(part.train) for part in parts])
    ranges = zip(names, labels, indices, clients, strict=True)

    def join_subsets(kind: str) -> np.ndarray:
        pairs = zip(parts, indices, strict=True)
        return np.concatenate([getattr(part, kind) + part_indices.start for part, part_indices in pairs])

    def join_clients(kind: str) -> list[np.ndarray]:
        pairs = zip(parts, indices, strict=True)
        return [subset + part_indices.start for part, part_indices in pairs for subset in getattr(part, kind)]

    train, validation = join_clients("train"), join_clients("validation")
    of_clients = np.concatenate([*train, *validation])
    server_validation = without_equal(contents, join_subsets("server_validation"), of_clients)
    test = without_equal(contents, join_subsets("test"), np.concatenate([of_clients, server_validation]))
    new_validation = without_trained(contents, validation, train)
    dropped = Dropped(
        duplicates=sum(len(part.server_validation) + len(part.test) for part in parts)
        - len(server_validation)
        - len(test),
        trained=sum(map(len, validation)) - sum(map(len, new_validation)),
    )
    return FederatedData(
        examples=examples,
        label_names=[f"{name}/{label}" for name, part in loaded.items() for label in part.label_names],
        client_names=[f"{name}/{client}" for name, part in loaded.items() for client in part.client_names],
        train=train,
        validation=new_validation,
        server_validation=server_validation,
        test=test,
        skipped=[
            part_clients.start + client
            for part, part_clients in zip(parts, clients, strict=True)
            for client in part.skipped
        ],
        dropped=sum((part.dropped for part in parts), start=dropped),
        digest=digest_of(names, [part.digest for part in parts]),
        tokens_digest=digest_of(names, [part.tokens_digest for part in parts]),
        datasets=[DatasetRanges(*dataset_ranges) for dataset_ranges in ranges],
    )


def _load(
    task: Task, data: DataConfig, seed: int, processor: Any
) -> tuple[FederatedData, dict[str, Tensor], np.ndarray]:
    """Load one data set; return it with the tensors that its task encoded it to, and the hashes of its contents."""
    encoding = encoding_key(task, data, processor)
    train, test = find_tables(data)
    sources = (content_digest(task, data, train), content_digest(task, data, test) if test else None)
    sizes = (data.server_validation_examples, data.test_examples)
    held_out_clients = (data.num_clients, data.held_out_clients) if data.held_out_clients else ()
    clients_elsewhere = data.partitioner == "own"
    comparison = () if data.duplicates == "exact" else (data.duplicates,)
    tokens_digest = digest_of(
        CACHE_VERSION, sources, encoding, data.client_column, sizes, held_out_clients, clients_elsewhere, *comparison
    )
    tokens, facts = cached(
        "tokens", tokens_digest, lambda: encode_tables(task, data, processor, train, test), train.where
    )
    unpartitioned = FederatedData(
        examples=task.examples(tokens, processor, data),
        label_names=facts["label_names"],
        server_validation=tokens["server_validation"].numpy(),
        test=tokens["test"].numpy(),
        held_out=tokens["held_out"].numpy(),
        held_out_names=facts["held_out_names"],
        dropped=Dropped(duplicates=facts["dropped_duplicates"], empty=facts["dropped_empty"]),
        digest=tokens_digest,
        tokens_digest=tokens_digest,
        read_rows=partial(read_train_rows, task, data, train),
    )
    encoded = {name: tensor for name, tensor in tokens.items() if name not in NOT_ENCODED}
    contents = tokens["contents"].numpy()
    if clients_elsewhere:
        return unpartitioned, encoded, contents
    split = (data.partitioner, data.alpha, data.classes_per_client, data.num_clients, data.validation_fraction)
    plugin = plugins.PARTITIONER.place(data.partitioner)
    code = (plugins.digest(data.partitioner, plugin),) if plugin else ()
    digest = digest_of(tokens_digest, split, seed, *code)
    splits, clients = cached("splits", digest, lambda: _split(data, seed, tokens, facts["client_names"]))
    client_names, unassigned = clients["client_names"], int((splits["owner"] < 0).sum())
    unlimited, candidates = (_subsets(splits, name) for name in ("train", "validation"))
    labels = tokens["labels"].numpy() if task.labels == "one" else None
    train_sets = [limit_train(train, data, labels) for train in unlimited]
    validation_sets = without_trained(contents, candidates, train_sets)
    limits = (data.client_examples, data.shots)
    skipped = [client for client, indices in enumerate(train_sets) if not len(indices)]
    if skipped and data.empty_clients == "refuse":
        names = listed([client_names[client] for client in skipped])
        raise ConfigError(f"empty-clients = 'refuse', and these clients have no training examples: {names}")
    federated = replace(
        unpartitioned,
        client_names=client_names,
        train=train_sets,
        validation=validation_sets,
        skipped=skipped,
        dropped=unpartitioned.dropped
        + Dropped(
            unassigned=unassigned,
            trained=sum(map(len, candidates)) - sum(map(len, validation_sets)),
            limited=sum(map(len, unlimited)) - sum(map(len, train_sets)),
        ),
        digest=digest_of(digest, limits) if any(limits) else digest,
    )
    return federated, encoded, contents


def _split(data: DataConfig, seed: int, tokens: dict[str, Tensor], natural_names: list[str]) -> Stored:
    """Partition the pool; return the tensors and facts of `partition`, and each client's subsets for `_subsets`."""
    tensors, facts = partition(data, seed, tokens, natural_names)
    pool, owner, number = tokens["pool"].numpy(), tensors["owner"].numpy(), len(facts["client_names"])
    both = split_clients(pool, owner, number, data.validation_fraction, seed)
    for name, subsets in zip(("train", "validation"), both, strict=True):
        tensors[name] = torch.from_numpy(np.concatenate(subsets))
        tensors[f"{name}_ends"] = torch.tensor([len(subset) for subset in subsets]).cumsum(0)
    return tensors, facts


def _subsets(splits: dict[str, Tensor], name: str) -> list[np.ndarray]:
    """Return the subset `name` of each client."""
    return np.split(splits[name].numpy(), splits[f"{name}_ends"].numpy()[:-1])


def _empty(task: Task, data: DataConfig, processor: Any) -> FederatedData:
    """Return FederatedData without examples, for a server without data: it has the labels only."""
    import pandas as pd

    task.processor_digest(processor)  # refuses a processor that the task cannot use
    rows = pd.DataFrame({key: pd.Series(dtype="string") for key in columns_of(task, data)})
    examples = task.examples(task.encode(rows, data.label_list, processor, data), processor, data)
    digest = digest_of(data.labels)
    return FederatedData(examples=examples, label_names=data.label_list, digest=digest, tokens_digest=digest)
