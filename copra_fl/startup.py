"""Preparation of every process that uses torch: environment, warning filters, and the large imports.

A process calls `prepare` before anything else in it imports torch: the commands of copra-fl, Flower's server app and
Ray's workers, under a plain `flwr run` too.

Importing torch, Transformers and PEFT is most of the time to the first round, in each process. Two packages that they
import wherever they are installed are a third of it, and hardly any run uses them (experiments/LOG.md). So `prepare`
defers scipy.optimize, and hides bitsandbytes from processes whose `environment` says that no run needs it.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copra_fl.config import Config

#: environment variable: packages, separated by commas, that count as not installed in this process
HIDDEN = "COPRA_FL_HIDDEN"


@functools.cache
def prepare() -> None:
    """Set the environment for torch, filter known warnings, and import the large modules; once per process."""
    # With OpenMP's default, threads spin at barriers: 10 times slower beside one other busy process
    # (experiments/LOG.md). OpenMP reads the variable once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # peft 0.21 still calls it, in every process that trains.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

    for package in filter(None, os.environ.get(HIDDEN, "").split(",")):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # Python's mark of a module that is not there

    # Disable garbage collection during imports, which create no garbage: saves 0.6 s per process.
    gc.disable()
    with deferred("scipy.optimize", "linear_sum_assignment"):  # for Transformers' losses of object detection
        import copra_fl.models.adapted  # noqa: F401

    gc.freeze()
    gc.enable()


def environment(configs: Iterable[Config]) -> dict[str, str]:
    """Return the environment variable for processes of runs of `configs`; none if one may need all packages.

    PEFT imports bitsandbytes wherever it is installed, but only bases in 4 bits use it. The user's own code may use it
    too.
    """
    from copra_fl import plugins

    may_need_all = [
        config.model.quantization != "none" or bool(config.training.script or plugins.named_in(config))
        for config in configs
    ]
    return {} if any(may_need_all) or not may_need_all else {HIDDEN: "bitsandbytes"}


@contextmanager
def deferred(name: str, function: str) -> Iterator[None]:
    """Let ``from NAME import FUNCTION`` in the block import nothing: the function imports the module when it is called.

    Anything else that the block takes from the module imports it at once.
    """
    stand_in = _Deferred(name, function)
    sys.modules.setdefault(name, stand_in)
    try:
        yield
    finally:
        stand_in.leave()


class _Deferred(ModuleType):
    """Stand-in for the package `name`, which is not imported yet."""

    def __init__(self, name: str, function: str) -> None:
        super().__init__(name)
        specification = find_spec(name)
        assert specification is not None, f"{name} is a dependency"
        self.__path__ = list(specification.submodule_search_locations or ())  # for imports of its submodules
        setattr(self, function, functools.partial(_call, name, function))

    def leave(self) -> None:
        """Make room for the module, unless it has been imported already."""
        if sys.modules[self.__name__] is self:
            del sys.modules[self.__name__]

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # `inspect` asks every module for its __file__
            raise AttributeError(attribute)
        self.leave()
        return getattr(import_module(self.__name__), attribute)


def _call(name: str, function: str, *arguments: Any, **settings: Any) -> Any:
    real: Callable[..., Any] = getattr(import_module(name), function)
    return real(*arguments, **settings)
