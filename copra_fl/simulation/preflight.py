"""Checks of configurations before anything starts, so that no run fails later because of its configuration.

They fetch the assets, encode the data into the cache, partition it, and check task, aggregation rule and target
modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from copra_fl.config import Config, ConfigError, csv_line
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.superlink import num_gpus
from copra_fl.sources.assets import fetch, find_asset, is_asset, is_fetched
from copra_fl.wording import listed

if TYPE_CHECKING:
    from copra_fl.data.federated import FederatedData
    from copra_fl.models.memory_plan import MemoryPlan


def check(configs: Iterable[Config], console: Console, request: WorkerRequest) -> list[Config]:
    """Check configurations and return them with number of clients, dtype and attention resolved.

    Raises ConfigError for a configuration that cannot run, and for workers that this machine has no memory or GPUs for;
    the memory of a Ray cluster is not known. Raises AssetError for an asset that cannot be fetched.
    """
    from copra_fl import startup

    with console.status("importing PyTorch and Transformers"):
        startup.prepare()
    from copra_fl.aggregation import compatibility
    from copra_fl.aggregation.accounting import check_installed
    from copra_fl.simulation import capacity
    from copra_fl.tasks import find_task

    configs = list(configs)
    if request.ray_address is None:
        capacity.check_gpus(request.workers, request.gpus_per_worker, num_gpus())
    for config in configs:
        compatibility.check(config, find_task(config.model.task))
        if config.privacy.dp_clip:
            check_installed()
    names = {name for config in configs for name in (*config.data.datasets, config.model.model)}
    fetch_with_progress(sorted(filter(is_asset, names)), console)
    prepared = functools.cache(_prepare)  # compared methods share model, data and seed
    with console.status("preparing the data"):
        checked = [_check_one(config, prepared) for config in configs]
    scripted = {(config.model, config.training.script): config for config, _, _ in checked if config.training.script}
    for config in scripted.values():
        _check_script(config, prepared, console)
    for note in dict.fromkeys(note for _, _, notes in checked for note in notes):
        console.print(f"note: {note}", soft_wrap=True)
    if request.ray_address is None:
        workers = request.share([config for config, _, _ in checked])
        free, gpu_memory = capacity.free_memory(), capacity.smallest_gpu_memory()
        for config, plan, _ in checked:
            capacity.check_memory(config, plan, workers, free, gpu_memory)
    return [config for config, _, _ in checked]


def fetch_with_progress(names: Iterable[str], console: Console) -> None:
    """Fetch the assets in `names` that the cache lacks, one after another, with a progress bar on `console`.

    Raises UnknownAssetError before anything is fetched, and AssetError as `copra_fl.sources.assets.fetch` does.
    """
    missing = [name for name in dict.fromkeys(names) if not is_fetched(name)]
    if not missing:
        return
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name in missing:
            size = find_asset(name).size
            task = progress.add_task(name, total=size)
            fetch(name, partial(_show, progress, task))
            progress.update(task, completed=size)  # another process may have fetched it


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _check_one(config: Config, prepared: Callable[[Config], FederatedData]) -> tuple[Config, MemoryPlan, list[str]]:
    """Return the resolved configuration, its memory plan, and notes about its data for the user."""
    from copra_fl.aggregation import compatibility
    from copra_fl.copra.layers import check_layers, deep_enough
    from copra_fl.data.federated import without_training
    from copra_fl.models import memory_plan
    from copra_fl.models.build import resolve_config
    from copra_fl.tasks import find_task

    config = config.changed(
        dataset=csv_line(name if is_asset(name, "data") else _absolute(name) for name in config.data.datasets),
        test_file=_absolute(config.data.test_file),
        script=_absolute(config.training.script),
        model=config.model.model if is_asset(config.model.model) else _absolute(config.model.model),
    )
    federated = prepared(without_training(config))
    config = resolve_config(config.changed(num_clients=len(federated.train)))
    compatibility.check(config, find_task(config.model.task))  # again, now that the number of clients is known
    size = len(federated.label_names), federated.examples.max_length
    check_layers(config, memory_plan.num_groups(config, federated.examples.max_length))
    trained = set(deep_enough(config, range(config.data.num_clients))).difference(federated.skipped)
    deep = f" and of depth {config.copra.min_depth} or more" if config.copra.min_depth else ""
    if not trained:
        raise ConfigError(f"there are no clients with data{deep}, among {config.data.num_clients}")
    if config.federation.clients_per_round > len(trained):
        raise ConfigError(
            f"clients-per-round = {config.federation.clients_per_round} is more than the {len(trained)} clients with "
            f"data{deep}"
        )
    config = memory_plan.limit_step_tokens(config, memory_plan.plan(config, *size))
    needed = memory_plan.plan(config, *size)
    notes = [*_notes(federated, config.federation.seed), f"memory per worker during training: {needed}"]
    return config, needed, notes


def _check_script(config: Config, prepared: Callable[[Config], FederatedData], console: Console) -> None:
    """Run the script for one client. Raises ConfigError if it fails, or makes a Trainer that cannot be federated."""
    from copra_fl.data.federated import without_training
    from copra_fl.training.trainer import check_script

    with console.status("running the script for one client"):
        check_script(prepared(without_training(config)), config)


def _prepare(config: Config) -> FederatedData:
    """Check the model of `config` and return its data."""
    from copra_fl.data.federated import load_data
    from copra_fl.models.build import check_max_length, check_model, load_processor

    check_model(config.model)
    check_max_length(config.model, config.data.max_length)
    if config.data.partitioner == "own":
        raise ConfigError(
            "partitioner = 'own' needs nodes with data files of their own, which simulated nodes do not have; "
            "use `copra-fl deploy run` (docs/how-to/own-data-on-nodes.md)"
        )
    if config.data.num_clients == 0 and config.data.partitioner != "natural":
        raise ConfigError("num-clients = 0: set the number of clients to simulate, for example --set num-clients=8")
    return load_data(config, load_processor(config.model))


def _notes(federated: FederatedData, seed: int) -> list[str]:
    notes = []
    if federated.dropped.empty:
        notes.append(f"{federated.dropped.empty} rows without content, label or client are left out")
    if federated.dropped.duplicates:
        notes.append(f"{federated.dropped.duplicates} held-out examples are left out: clients have the same examples")
    if federated.dropped.trained:
        notes.append(
            f"seed {seed}: {federated.dropped.trained} validation examples of clients are left out: clients train on "
            "the same examples"
        )
    if federated.held_out_names:
        notes.append(f"held-out clients: {', '.join(federated.held_out_names)}")
    if federated.dropped.unassigned:
        notes.append(f"seed {seed}: the partitioner assigned {federated.dropped.unassigned} examples to no client")
    if federated.dropped.limited:
        notes.append(f"seed {seed}: client-examples and shots leave out {federated.dropped.limited} training examples")
    if federated.skipped:
        names = listed([federated.client_names[client] for client in federated.skipped])
        notes.append(f"seed {seed}: clients without training data are skipped: {names}")
    return notes


def _absolute(name: str) -> str:
    """Return `name` as an absolute path if it exists, because Flower runs in another folder; else unchanged."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name
