"""One tree of seeds: every random stream is named, and none is the global one.

``derive(root, "mask", 3, 7)`` is the seed of the stream of that name. Streams with
different names are independent: drawing masks never moves the data order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(root: int, *names: str | int) -> int:
    """The 63-bit seed of the stream `names` below `root`: the start of a SHA-256."""
    path = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def generator(root: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the stream `names` below `root`."""
    return np.random.default_rng(derive(root, *names))


@contextmanager
def torch_stream(device: torch.device, root: int, *names: str | int) -> Iterator[None]:
    """Inside, torch's own generators are the stream `names`; afterwards they are as before.

    For library code that only draws from torch's global generators (LoRA's init, dropout).
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(root, *names))
        yield
