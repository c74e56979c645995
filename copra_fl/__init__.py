"""copra-fl: federated LoRA with CopRA on Flower, Ray, PyTorch, PEFT and Transformers."""

import logging
from importlib.metadata import version
from typing import Any

__version__ = version("copra-fl")

# PEFT imports bitsandbytes wherever it is installed, which then warns on CPUs with AVX512-BF16 that a kernel is not
# installed. copra-fl never uses that kernel (bases.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """`CopraCallback`, imported with its first use: Transformers and PEFT take seconds."""
    if name == "CopraCallback":
        from copra_fl.copra.callback import CopraCallback

        return CopraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
