"""Everything that can be wrong with a configuration, found before anything starts.

Fetches the assets, tokenises the data once into the cache, deals it out to the clients and
looks for rule and target modules. What passes here does not fail for its configuration later.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from copra_fl.cli.assets import fetch_with_progress
from copra_fl.config import Config, ConfigError


def check(configs: Iterable[Config], console: Console) -> list[Config]:
    """The configurations, with the number of clients made plain. Raises ConfigError, AssetError."""
    configs = list(configs)
    from copra_fl.assets import ASSETS

    names = {name for config in configs for name in (config.data.dataset, config.model.model)}
    fetch_with_progress(sorted(names & ASSETS.keys()), console)
    with console.status("preparing the data"):
        return [_check_one(config) for config in configs]


def _check_one(config: Config) -> Config:
    from copra_fl import data, models
    from copra_fl.aggregation import find_rule

    find_rule(config.federation.rule)
    models.check(config.model)
    if config.data.num_clients == 0 and config.data.partitioner != "natural":
        raise ConfigError("num-clients = 0: say how many clients to simulate, for example --set num-clients=8")
    config = config.changed(**{key: _absolute(value) for key, value in _places(config).items()})
    federated = data.load(config, models.load_tokenizer(config.model.model))
    num_clients = len(federated.train)
    trained = num_clients - len(federated.skipped)
    if config.federation.clients_per_round > trained:
        raise ConfigError(
            f"clients-per-round = {config.federation.clients_per_round} is more than the {trained} clients with data"
        )
    return config.changed(num_clients=num_clients)


def _places(config: Config) -> dict[str, str]:
    """The keys that may name a file or folder."""
    return {"dataset": config.data.dataset, "test_file": config.data.test_file, "model": config.model.model}


def _absolute(name: str) -> str:
    """A path as it is seen from anywhere, since Flower runs in another folder; other names as they are."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name
