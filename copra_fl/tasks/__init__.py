"""What models learn: one file a task.

``task`` in a configuration is the name of a module here (with - for _), or the dotted name of a module of a user's own;
either has ``TASK``, a `Task`. docs/tasks.md shows one that is complete.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from copra_fl.config import ConfigError
from copra_fl.tasks.task import Examples, Inputs, Task
from copra_fl.wording import unknown_name

__all__ = ["Examples", "Inputs", "Task", "find_task"]


def find_task(name: str) -> Task:
    """The task called `name`. Raises ConfigError where there is none."""
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
            f"task = {name!r}: there is no module {name} that can be imported and has TASK, a Task. Install it, or put "
            "the full path of its folder on PYTHONPATH"
        )
    raise ConfigError(
        f"{unknown_name('task', name, _names())}; one of your own has a dotted name, as in hospital.tagging"
    )


def _names() -> list[str]:
    """The tasks that are here."""
    modules = [name for _, name, _ in iter_modules(__path__)]
    return [name.replace("_", "-") for name in modules if hasattr(import_module(f"{__name__}.{name}"), "TASK")]
