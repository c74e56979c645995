"""Cache of computed tensors: one process computes them, all others read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from copra_fl.files import atomic_write, cache_dir

#: values that are stored with tensors, as JSON
Facts = dict[str, Any]
Stored = tuple[dict[str, Tensor], Facts]


def cached(kind: str, digest: str, build: Callable[[], Stored]) -> Stored:
    """Return the tensors (mapped into memory) and facts stored under `digest`; one process builds them if needed."""
    path = cache_dir() / kind / f"{digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                tensors, facts = build()
                atomic_write(path, save(tensors, {"facts": json.dumps(facts)}))
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["facts"])
