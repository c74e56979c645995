"""Hold out examples from the clients: test set, server validation set, whole clients.

The sets depend on the data alone, never on the run's seed, so that validation data of one seed is never test data of
another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from copra_fl.config import ConfigError, DataConfig
from copra_fl.data.partition import largest
from copra_fl.seeding import generator
from copra_fl.sources.tables import codes

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd

    from copra_fl.tasks import Task

#: between a prompt and a content that are compared as one text
BETWEEN_COLUMNS = "\x1f"
#: the seed of held-out sets
HELD_OUT_ROOT = 0

_TITLES = {"test": "test set", "held_out": "held-out clients", "server_validation": "server's validation set"}


def choose_clients(data: DataConfig, rows: pd.DataFrame, names: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of the largest ``num-clients + held-out-clients`` clients, and the names of those held out.

    With ``num-clients = 0`` these are all clients. `names` are the names of all clients, in order. Raises ConfigError
    if there are too few.
    """
    needed = max(1, data.num_clients) + data.held_out_clients
    if needed > len(names):
        raise ConfigError(
            f"num-clients = {data.num_clients} and held-out-clients = {data.held_out_clients} need at least {needed} "
            f"clients, but the client column has {len(names)} values"
        )
    number = data.num_clients and needed
    chosen = [names[client] for client in largest(codes(rows["client-column"], names).numpy(), names, number)]
    drawn = generator(HELD_OUT_ROOT, "unseen-clients").permutation(len(chosen))[: data.held_out_clients]
    kept = rows[rows["client-column"].isin(chosen)].reset_index(drop=True)
    return kept, [chosen[client] for client in np.sort(drawn)]


def hold_out(
    data: DataConfig, contents: np.ndarray, num_train: int, of_held_out_clients: np.ndarray
) -> tuple[dict[str, np.ndarray], int]:
    """Return the indices of ``test``, ``server_validation``, ``held_out`` and ``pool``, and the number of duplicates.

    A held-out example is dropped as a duplicate if an equal one is in the pool; of ``test`` and ``held_out`` also if
    one is in ``server_validation``.

    Args:
        contents: hashes (`content_hashes`) of `num_train` training examples, then of the test set if there is one.
        of_held_out_clients: indices of the examples of clients that are held out whole.

    Raises ConfigError if the sets would take more than half of the clients' examples, or if a set ends up empty.
    """
    test = np.arange(num_train, len(contents))
    num_test = 0 if len(test) else data.test_examples
    num_taken = num_test + data.server_validation_examples
    clients_elsewhere = data.partitioner == "own"
    seen = np.setdiff1d(np.arange(num_train), of_held_out_clients)
    if num_taken > len(seen) or (2 * num_taken > len(seen) and not clients_elsewhere):
        settings = [f"test-examples = {num_test}"] if num_test else []
        settings.append(f"server-validation-examples = {data.server_validation_examples}")
        limit = "" if clients_elsewhere else "; at most half of them can be held out from the clients"
        raise ConfigError(f"{' and '.join(settings)} would take {num_taken} of {len(seen)} examples{limit}")
    order = generator(HELD_OUT_ROOT, "held-out").permutation(seen)
    if num_test:
        test = order[:num_test]
    validation = order[num_test:num_taken]
    pool = order[num_taken:num_taken] if clients_elsewhere else order[num_taken:]
    held_out_test = generator(HELD_OUT_ROOT, "unseen").permutation(of_held_out_clients)[: data.test_examples]
    held_out = {"test": test, "held_out": held_out_test, "server_validation": validation}
    subsets, num_duplicates = {"pool": pool}, 0
    for name, indices in held_out.items():
        others = pool if name == "server_validation" else np.concatenate([validation, pool])
        subsets[name] = without_equal(contents, indices, others)
        num_duplicates += len(indices) - len(subsets[name])
        if len(indices) and not len(subsets[name]):
            raise ConfigError(
                f"nothing is left of the {_TITLES[name]}: all of its examples also occur among the other examples"
            )
    return {name: np.sort(indices) for name, indices in subsets.items()}, num_duplicates


def content_hashes(task: Task, data: DataConfig, rows: pd.DataFrame) -> np.ndarray:
    """Return a hash (N,) int64 of each example; equal ones have equal hashes in all data sets and processes.

    Examples are equal if their content is, and their prompts in tasks that have them. ``duplicates = near`` compares
    `words_of` texts.
    """
    from pandas.util import hash_array

    contents = rows[task.columns[0]]
    for name in task.optional_columns:
        if name in rows:
            contents = rows[name].fillna("").astype(str) + BETWEEN_COLUMNS + contents
    compared = words_of(contents) if data.duplicates == "near" else contents
    return hash_array(compared.to_numpy(object)).view(np.int64)


def without_equal(contents: np.ndarray, indices: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return those of `indices` whose content equals that of none of the examples `others`."""
    return indices[~np.isin(contents[indices], contents[others])]


def without_trained(contents: np.ndarray, validation: list[np.ndarray], train: list[np.ndarray]) -> list[np.ndarray]:
    """Return each client's validation examples without those that equal a training example of any client."""
    is_new = ~np.isin(contents[np.concatenate(validation)], contents[np.concatenate(train)])
    ends = np.cumsum([len(subset) for subset in validation])[:-1]
    return [subset[kept] for subset, kept in zip(validation, np.split(is_new, ends), strict=True)]


def words_of(texts: pd.Series) -> pd.Series:
    """Return `texts` in lower case, without links and punctuation; a text without any word stays as it is."""
    words = texts.str.replace(r"https?://\S+|www\.\S+", " ", regex=True).str.lower()
    words = words.str.replace(r"[\W_]+", " ", regex=True).str.strip()
    return words.where(words != "", texts)
