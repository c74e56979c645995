"""Tasks that models learn, one file each.

``task`` in a configuration is the name of a module in this folder (with - for _) or the dotted name of a user's module;
both have ``TASK``, a `Task`. docs/explanations/tasks.md shows a complete one.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from copra_fl.config import ConfigError
from copra_fl.tasks.task import Examples, Inputs, Task
from copra_fl.wording import unknown_name

__all__ = ["Examples", "Inputs", "Task", "find_task"]


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises ConfigError for an unknown name."""
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
