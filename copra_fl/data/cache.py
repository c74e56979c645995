"""Cache of computed tensors and facts: computed once by one process, read by all others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from copra_fl.sources.assets import cache_dir

if TYPE_CHECKING:  # slow to import, and needed only where the cache is empty
    pass


Facts = dict[str, Any]


Stored = tuple[dict[str, Tensor], Facts]


def cached(kind: str, digest: str, build: Callable[[], Stored]) -> Stored:
    """The tensors and facts kept under `digest`, mapped into memory; built first, by one process, if not there."""
    path = cache_dir() / kind / f"{digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _write(path, *build())
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["facts"])


def _write(path: Path, tensors: dict[str, Tensor], facts: Facts) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(save(tensors, {"facts": json.dumps(facts)}))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
