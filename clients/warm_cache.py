"""What one process keeps warm between messages: the base model and the tokenised data.

Opening them takes far longer than a short local training, so each process opens them once;
rounds, and runs of one comparison, differ in adapters and partitions only.
"""

from __future__ import annotations

from functools import lru_cache

from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.data.local import load_local_data
from copra_fl.models.build import load_processor
from copra_fl.training import engine

#: its adapter's values come with each message
open_engine = lru_cache(maxsize=1)(engine.open_engine)


@lru_cache(maxsize=4)
def open_data(config: Config) -> FederatedData:
    """The clients' examples, from the token cache."""
    return load_data(config, load_processor(config.model))


@lru_cache(maxsize=4)
def open_own(config: Config, path: str, client: int, num_clients: int) -> FederatedData:
    """The examples in a node's own file, from the token cache."""
    return load_local_data(config, load_processor(config.model), path, client, num_clients)
