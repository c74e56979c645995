"""Cache of computed tensors: one process computes them, all others read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from copra_fl.files import DamagedFile, cache_dir
from copra_fl.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)

#: name of the text with the path that a cached file comes from
SOURCE = "source"
#: values that are stored with tensors, as JSON
Facts = dict[str, Any]
Stored = tuple[dict[str, Tensor], Facts]


def cached(kind: str, digest: str, build: Callable[[], Stored], source: str = "") -> Stored:
    """Return the tensors (mapped into memory) and facts stored under `digest`; one process builds them if needed.

    A damaged file is named in the log and built again. `source` is the path of a local file or folder that the tensors
    come from: `copra-fl clean` removes them when it is gone, and only the user can read them.
    """
    path = cache_dir() / kind / f"{digest}.safetensors"
    try:
        return _read(path)
    except (FileNotFoundError, DamagedFile):
        path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            return _read(path)  # another process has built it meanwhile
        except FileNotFoundError:
            pass
        except DamagedFile as damage:
            log.warning("%s; it is built again", damage)
        tensors, facts = build()
        origin = str(Path(source).absolute()) if source and Path(source).exists() else ""
        mode = 0o600 if origin else 0o666
        write_tensors(path, tensors, {"facts": json.dumps(facts), SOURCE: origin}, mode)
    return _read(path)


def _read(path: Path) -> Stored:
    tensors, texts = read_tensors(path)
    return tensors, json.loads(texts["facts"])
