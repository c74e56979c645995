"""copra-fl: federated LoRA with CopRA on Flower, Ray, PyTorch, PEFT and Transformers."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copra_fl.api.runs import compare, simulate
    from copra_fl.config import Config, ConfigError
    from copra_fl.copra.callback import CopraCallback
    from copra_fl.models.export import load
    from copra_fl.reporting.results import Comparison, ResultsError, Run, load_comparison, load_run
    from copra_fl.simulation.superlink import RunFailed
    from copra_fl.sources.tables import TableError
    from copra_fl.training.script import client_data, federate

__all__ = [
    "Comparison",
    "Config",
    "ConfigError",
    "CopraCallback",
    "ResultsError",
    "Run",
    "RunFailed",
    "TableError",
    "client_data",
    "compare",
    "federate",
    "load",
    "load_comparison",
    "load_run",
    "simulate",
]
__version__ = version("copra-fl")

# PEFT imports bitsandbytes wherever it is installed, which then warns on CPUs with AVX512-BF16 that a kernel is not
# installed. copra-fl never uses that kernel (models/base_weights.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_MODULES = {
    "Comparison": "copra_fl.reporting.results",
    "Config": "copra_fl.config",
    "ConfigError": "copra_fl.config",
    "CopraCallback": "copra_fl.copra.callback",
    "ResultsError": "copra_fl.reporting.results",
    "Run": "copra_fl.reporting.results",
    "RunFailed": "copra_fl.simulation.superlink",
    "TableError": "copra_fl.sources.tables",
    "client_data": "copra_fl.training.script",
    "compare": "copra_fl.api.runs",
    "federate": "copra_fl.training.script",
    "load": "copra_fl.models.export",
    "load_comparison": "copra_fl.reporting.results",
    "load_run": "copra_fl.reporting.results",
    "simulate": "copra_fl.api.runs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch, Transformers and PEFT take seconds to import."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
