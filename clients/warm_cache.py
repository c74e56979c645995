"""Cache of one process between messages: the base model and the tokenized data.

Opening them takes far longer than a short local training, so each process opens them once. Rounds, and the runs of one
comparison, differ only in adapters and partitions.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, ParamSpec, TypeVar

from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.data.local import load_local_data
from copra_fl.models.build import load_processor
from copra_fl.training import engine

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class KeepNewest(Generic[Arguments, Result]):
    """A function that keeps its newest result, and frees it before it makes another: two bases may not fit on a GPU."""

    def __init__(self, make: Callable[Arguments, Result]) -> None:
        self._make = make
        self._kept: dict[object, Result] = {}

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        key = args, tuple(sorted(kwargs.items()))
        if key not in self._kept:
            self.cache_clear()
            self._kept[key] = self._make(*args, **kwargs)
        return self._kept[key]

    def cache_clear(self) -> None:
        """Free the result."""
        if self._kept:
            self._kept.clear()
            gc.collect()  # blocks with gradient-checkpointing refer to themselves


#: `engine.open_engine`; each message brings the values of the adapter
open_engine = KeepNewest(engine.open_engine)


@lru_cache(maxsize=4)
def open_data(config: Config) -> FederatedData:
    """Load the run's clients' examples from the token cache; `config` has what they depend on (`without_training`)."""
    return load_data(config, load_processor(config.model))


@lru_cache(maxsize=4)
def open_own_data(config: Config, path: str, client: int, num_clients: int) -> FederatedData:
    """Load the examples in the node's own file `path`, those of `client`, from the token cache; `config` likewise."""
    return load_local_data(config, load_processor(config.model), path, client, num_clients)
