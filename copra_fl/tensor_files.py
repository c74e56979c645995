"""Files of tensors that notice damage: safetensors with a digest of everything in them.

Without it, a checkpoint whose bytes have changed on the disk would continue a run from another adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from copra_fl.files import DamagedFile, atomic_write

#: key of the digest in the file's header
DIGEST = "sha256"
#: name of the tensor with the bytes of all texts as JSON; the header of a safetensors file is limited to 100 MB
TEXTS = "/texts"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], mode: int = 0o666) -> None:
    """Write `tensors` and `texts` by name, atomically: the file is complete or does not exist.

    `mode` is its permissions, before the umask.
    """
    encoded = torch.from_numpy(np.frombuffer(bytearray(json.dumps(dict(texts)).encode()), dtype=np.uint8))
    values = {name: tensor.contiguous() for name, tensor in tensors.items()} | {TEXTS: encoded}
    atomic_write(path, save(values, {DIGEST: digest(values)}), mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors, mapped into memory, and texts. Raises DamagedFile unless they are those that were written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get(DIGEST)
    except SafetensorError as error:
        raise DamagedFile(path, str(error)) from error
    if written is None:
        raise DamagedFile(path, "it has no digest; an earlier version of copra-fl wrote it")
    if written != digest(tensors):
        raise DamagedFile(path, "its content does not match its digest")
    return tensors, json.loads(tensors.pop(TEXTS).numpy().tobytes())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty tensor has no bytes to view
            hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
