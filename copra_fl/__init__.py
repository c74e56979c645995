"""copra-fl: federated LoRA with CopRA on Flower, Ray, PyTorch, PEFT and Transformers."""

from importlib.metadata import version

__version__ = version("copra-fl")
