"""Named random streams, derived from one seed; the global generators are never used.

``derive(root, "mask", 3, 7)`` is the seed of the stream of that name. Streams with different names are independent:
drawing masks does not change the data order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch


def derive(root: int, *names: str | int) -> int:
    """Return the 63-bit seed of the stream `names` below `root`: the first bits of a SHA-256."""
    path = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def generator(root: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator for the stream `names` below `root`."""
    return np.random.default_rng(derive(root, *names))


def assign(values: Sequence[int], assignment: str, num_clients: int, root: int, name: str) -> Sequence[int]:
    """Return the value of each client: `values` as ``listed``, ``repeated`` until there is one for each client, or
    ``drawn`` from `values` with stream `name`.
    """
    return _assign(tuple(values), assignment, num_clients, root, name)


@lru_cache(maxsize=8)  # it is asked for each client of a round
def _assign(values: tuple[int, ...], assignment: str, num_clients: int, root: int, name: str) -> list[int]:
    if assignment == "repeated":
        return [values[client % len(values)] for client in range(num_clients)]
    if assignment == "drawn":
        return [int(value) for value in generator(root, name).choice(values, num_clients)]
    return list(values)


@contextmanager
def torch_stream(device: torch.device, root: int, *names: str | int) -> Iterator[None]:
    """Replace torch's global generators by the stream `names` inside the block, and restore them afterwards.

    This is for library code that draws from torch's global generators only (LoRA's initialization, dropout).
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(root, *names))
        yield


@contextmanager
def global_stream(root: int, *names: str | int) -> Iterator[None]:
    """Replace the global generators of Python, NumPy and torch by the stream `names`, as `torch_stream` does torch's.

    This is for the code of users, which may draw from any of them.
    """
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            seed = derive(root, *names)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
