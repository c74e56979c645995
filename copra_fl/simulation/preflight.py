"""Everything that can be wrong with a configuration, found before anything starts.

Fetches the assets, encodes the data once into the cache, deals it out to the clients and
looks for task, rule and target modules. What passes here does not fail for its configuration later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from copra_fl.config import Config, ConfigError, FederationConfig, csv_line
from copra_fl.sources.assets import ASSETS, fetch, find_asset, is_fetched

if TYPE_CHECKING:
    from copra_fl.data.federated import FederatedData


def check(configs: Iterable[Config], console: Console) -> list[Config]:
    """The configurations, with number of clients, dtype and attention made plain. Raises ConfigError, AssetError."""
    import copra_fl.startup  # noqa: F401
    from copra_fl import tasks
    from copra_fl.aggregation import check as check_rule

    configs = list(configs)
    for config in configs:
        check_rule(config)
        tasks.check(config)
    names = {name for config in configs for name in (*config.data.datasets, config.model.model)}
    fetch_with_progress(sorted(names & ASSETS.keys()), console)
    prepared = functools.cache(_prepare)  # methods that are compared have model, data and seed in common
    with console.status("preparing the data"):
        checked = [_check_one(config, prepared) for config in configs]
    for note in dict.fromkeys(note for _, notes in checked for note in notes):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return [config for config, _ in checked]


def fetch_with_progress(names: Iterable[str], console: Console) -> None:
    """Fetch what is missing of `names`, one after another, with a progress bar on `console`.

    Raises UnknownAssetError before anything is fetched, and AssetError as `copra_fl.sources.assets.fetch` does.
    """
    missing = [find_asset(name) for name in dict.fromkeys(names) if not is_fetched(name)]
    if not missing:
        return
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for asset in missing:
            task = progress.add_task(asset.name, total=asset.size)
            fetch(asset.name, partial(_show, progress, task))
            progress.update(task, completed=asset.size)  # also where another process did the work


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _check_one(config: Config, prepared: Callable[[Config], FederatedData]) -> tuple[Config, list[str]]:
    """The configuration with what was left open in it, and what its user should know of the data."""
    from copra_fl.aggregation import check as check_rule
    from copra_fl.models import memory_plan
    from copra_fl.models.build import resolve_config

    config = config.changed(
        dataset=csv_line(map(_absolute, config.data.datasets)),
        test_file=_absolute(config.data.test_file),
        model=_absolute(config.model.model),
    )
    federated = prepared(Config(config.data, config.model, federation=FederationConfig(seed=config.federation.seed)))
    num_clients = len(federated.train)
    trained = num_clients - len(federated.skipped)
    if config.federation.clients_per_round > trained:
        raise ConfigError(
            f"clients-per-round = {config.federation.clients_per_round} is more than the {trained} clients with data"
        )
    config = resolve_config(config).changed(num_clients=num_clients)
    check_rule(config)  # again, as the ranks of the clients must be as many as there are clients
    size = len(federated.label_names), federated.examples.max_length
    config = memory_plan.limit_step_tokens(config, memory_plan.plan(config, *size))
    needed = memory_plan.plan(config, *size)
    return config, [*_notes(federated, config.federation.seed), f"memory of a worker in training: {needed}"]


def _prepare(config: Config) -> FederatedData:
    """The data of `config`, after a look at its model."""
    from copra_fl.data.federated import load_data
    from copra_fl.models.build import check_model, load_processor

    check_model(config.model)
    if config.data.partitioner == "own":
        raise ConfigError(
            "partitioner = 'own': each node has a data file of its own, and simulated nodes have none; "
            "copra-fl deploy run sends it to nodes that have (docs/nodes.md)"
        )
    if config.data.num_clients == 0 and config.data.partitioner != "natural":
        raise ConfigError("num-clients = 0: say how many clients to simulate, for example --set num-clients=8")
    return load_data(config, load_processor(config.model))


def _notes(federated: FederatedData, seed: int) -> list[str]:
    notes = []
    if federated.dropped.empty:
        notes.append(f"{federated.dropped.empty} rows without content, label or client were left out")
    if federated.dropped.duplicates:
        notes.append(f"{federated.dropped.duplicates} held-out examples were left out: clients hold the same ones")
    if federated.held_out_names:
        notes.append(f"held out whole, as held-out clients: {', '.join(federated.held_out_names)}")
    if federated.dropped.unassigned:
        notes.append(f"seed {seed}: the partitioner gave {federated.dropped.unassigned} examples to no client")
    if federated.skipped:
        names = ", ".join(federated.client_names[client] for client in federated.skipped)
        notes.append(f"seed {seed}: clients without training data are skipped: {names}")
    return notes


def local_paths(config: Config) -> list[str]:
    """Files and folders that a configuration names, once it is checked: there they are absolute."""
    places = [*config.data.datasets, config.data.test_file, config.model.model]
    return [place for place in places if Path(place).is_absolute()]


def _absolute(name: str) -> str:
    """A path as it is seen from anywhere, since Flower runs in another folder; other names as they are."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name
