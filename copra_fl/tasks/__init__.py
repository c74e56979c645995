"""Tasks that models learn, one file each.

``task`` in a configuration is the name of a module in this folder (with - for _), which has ``TASK``, a `Task`; or that
of a plugin (`copra_fl.plugins`). docs/how-to/write-a-task.md shows a complete one.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from copra_fl import plugins
from copra_fl.tasks.task import Examples, Inputs, Task

__all__ = ["Examples", "Inputs", "Task", "find_task"]


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises ConfigError for an unknown name, and as `plugins.Kind.find` does."""
    if name in _modules():
        task = getattr(import_module(f"{__name__}.{name.replace('-', '_')}"), "TASK", None)
        if isinstance(task, Task):
            return task
    plugin: Task = plugins.TASK.find(name, Task, _names())
    return plugin


def _names() -> list[str]:
    """Return the names of the tasks in this folder."""
    return [name for name in _modules() if hasattr(import_module(f"{__name__}.{name.replace('-', '_')}"), "TASK")]


def _modules() -> list[str]:
    """Return the names of the modules in this folder, with - for _."""
    return [name.replace("_", "-") for _, name, _ in iter_modules(__path__)]
