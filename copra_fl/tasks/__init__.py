"""Tasks that models learn, one file each.

``task`` in a configuration is the name of a module in this folder (with - for _) or the dotted name of a user's module;
both have ``TASK``, a `Task`. docs/tasks.md shows a complete one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from copra_fl.config import BY_LABEL, Config, ConfigError, DataConfig
from copra_fl.sources.tables import dataset_name
from copra_fl.tasks.task import Examples, Inputs, Task
from copra_fl.wording import unknown_name

__all__ = ["Examples", "Inputs", "Task", "check", "find_task"]


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises ConfigError if there is none."""
    module = name if "." in name else f"{__name__}.{name.replace('-', '_')}"
    try:
        task = getattr(import_module(module), "TASK", None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        task = None
    if isinstance(task, Task):
        return task
    if "." in name:
        raise ConfigError(
            f"task = {name!r}: there is no module {name} that can be imported and has TASK, a Task. Install it, or add "
            "the absolute path of its folder to PYTHONPATH"
        )
    raise ConfigError(
        f"{unknown_name('task', name, _names())}. A task of your own has a dotted name, as in hospital.tagging"
    )


def _names() -> list[str]:
    """Return the names of the tasks in this folder."""
    modules = [name for _, name, _ in iter_modules(__path__)]
    return [name.replace("_", "-") for name in modules if hasattr(import_module(f"{__name__}.{name}"), "TASK")]


def check(config: Config) -> None:
    """Raise ConfigError for a task that there is not, or that cannot do what `config` wants of it."""
    task, data, called = find_task(config.model.task), config.data, f"task = {config.model.task!r}"
    if data.partitioner in BY_LABEL and task.labels != "one":
        raise ConfigError(
            f"partitioner = {data.partitioner!r} deals examples out by their label, and {called} has not one label an "
            "example; use natural, iid or own"
        )
    if not (data.dataset or data.labels) and task.labels != "none":
        raise ConfigError(f"dataset = '' (the server has no data) and {called} need the list of labels: set labels")
    if len(data.datasets) > 1:
        for reason in _conflicts_of_several(data, task):
            raise ConfigError(f"dataset = {data.dataset!r} (several data sets) does not combine with {reason}")
    if config.copra.local_training == "head" and not task.trains_head:
        raise ConfigError(
            f"local-training = 'head' has nothing to train: {called} has no head of its own; use copra or lora"
        )


def _conflicts_of_several(data: DataConfig, task: Task) -> Iterator[str]:
    names = [dataset_name(dataset) for dataset in data.datasets]
    if not all(names) or len(set(names)) < len(names):
        yield f"data sets that are called {', '.join(map(repr, names))}: each needs a name of its own"
    if task.labels != "one":
        yield f"task = {task.name!r}, which has not one label an example"
    if data.num_clients < len(names):
        yield f"num-clients = {data.num_clients}: it takes one a data set at least, {len(names)}"
    if data.partitioner == "own":
        yield "partitioner = 'own', where nodes have data of their own"
    if data.labels:
        yield f"labels = {data.labels!r}: each has a list of its own"
    if data.test_file:
        yield f"test-file = {data.test_file!r}: each has a test set of its own"
    if data.held_out_clients:
        yield f"held-out-clients = {data.held_out_clients}: whose they would be is not settled"
