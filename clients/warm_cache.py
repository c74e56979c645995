"""Cache of one process between messages: the base model and the tokenized data.

Opening them takes far longer than a short local training, so each process opens them once. Rounds, and the runs of one
comparison, differ only in adapters and partitions.
"""

from __future__ import annotations

from functools import lru_cache

from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.data.local import load_local_data
from copra_fl.models.build import load_processor
from copra_fl.training import engine

#: `engine.open_engine`; each message brings the values of the adapter
open_engine = lru_cache(maxsize=1)(engine.open_engine)


@lru_cache(maxsize=4)
def open_data(config: Config) -> FederatedData:
    """Load the run's clients' examples from the token cache."""
    return load_data(config, load_processor(config.model))


@lru_cache(maxsize=4)
def open_own_data(config: Config, path: str, client: int, num_clients: int) -> FederatedData:
    """Load the examples in the node's own file `path`, as those of `client`, from the token cache."""
    return load_local_data(config, load_processor(config.model), path, client, num_clients)
