"""copra-fl: federated LoRA with CopRA on Flower, Ray, PyTorch, PEFT and Transformers."""

from importlib.metadata import version
from typing import Any

__version__ = version("copra-fl")


def __getattr__(name: str) -> Any:
    """`CopraCallback`, imported with its first use: Transformers and PEFT take seconds."""
    if name == "CopraCallback":
        from copra_fl.copra.callback import CopraCallback

        return CopraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
