"""copra-fl: federated LoRA with CopRA on Flower, Ray, PyTorch, PEFT and Transformers."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copra_fl.config import Config
    from copra_fl.copra.callback import CopraCallback
    from copra_fl.models.export import load

__all__ = ["Config", "CopraCallback", "load"]
__version__ = version("copra-fl")

# PEFT imports bitsandbytes wherever it is installed, which then warns on CPUs with AVX512-BF16 that a kernel is not
# installed. copra-fl never uses that kernel (models/base_weights.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_MODULES = {"Config": "copra_fl.config", "CopraCallback": "copra_fl.copra.callback", "load": "copra_fl.models.export"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch, Transformers and PEFT take seconds to import."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
