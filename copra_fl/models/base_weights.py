"""Open the frozen base from a file in its compute dtype, mapped into memory.

Processes that map one file share its pages, so that another worker costs only its adapter and its activations.
Converting while loading would give every process its own copy. A base stored in another dtype is therefore converted
once and kept:

    CACHE/bases/DIGEST/     a folder that Transformers' from_pretrained opens
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from copra_fl.files import CacheError, build_once, cache_dir, changed_files, digest_of, kept_digest, sha256

transformers_logging.disable_progress_bar()

#: files in which Transformers looks for weights, in its order; an index lists the files of sharded weights
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_base(source: str, dtype: str, attention: str, model_class: Any) -> PreTrainedModel:
    """Open the model `source`, a folder or a name on the hub, with weights in `dtype` that all processes share.

    `model_class` is the Transformers class that opens it. `attention` is eager or sdpa; a model without sdpa uses
    eager. Raises OSError or ValueError if there is no such model, CacheError if it cannot be stored in `dtype`.
    """
    converted = cache_dir() / "bases" / digest_of(_identity(source), dtype, model_class.__name__)
    if changed_files(converted):
        base = _open(source, "auto", attention, model_class)
        if base.dtype == getattr(torch, dtype):
            return base
        _convert(source, dtype, model_class, converted)
    base = _open(str(converted), dtype, attention, model_class)
    base.name_or_path = base.config.name_or_path = source  # the name that PEFT writes to an adapter folder
    return base


def open_quantized(source: str, dtype: str, attention: str, model_class: Any, device: torch.device) -> PreTrainedModel:
    """Open the model `source` with linear layers in 4 bits on `device`, computing in `dtype`; each process has a copy.

    It is quantized while it loads, as in QLoRA (Dettmers et al., arXiv:2305.14314): NF4 with double quantization.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    settings = {"quantization_config": quantization, "device_map": {"": device}}
    base = _open(source, dtype, attention, model_class, **settings)
    _keep_unpacked(base)
    return base


def _keep_unpacked(base: PreTrainedModel) -> None:
    """Make the 4-bit layers of `base` compute with their weights as they were quantized, on every CPU.

    On a CPU with AVX512-BF16, the first evaluation would make bitsandbytes (0.50.2) repack a layer's weights for a
    fused kernel for good. That kernel has no gradient, so the next training would fail; it rounds to bfloat16 whatever
    `dtype` is; and packing fails unless a layer's inputs are a multiple of 64 and its outputs a multiple of 32.
    """
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _open(source: str, dtype: str, attention: str, model_class: Any, **settings: Any) -> PreTrainedModel:
    # With "sdpa" Transformers raises for a model without sdpa; with None it uses sdpa if the model has it.
    implementation = None if attention == "sdpa" else attention
    return model_class.from_pretrained(source, dtype=dtype, attn_implementation=implementation, **settings)


def _identity(source: str) -> list[object]:
    """Return values that change when the model changes: the folder; for one that is not of the hub, its digests too."""
    folder = Path(str(cached_file(source, "config.json"))).parent
    if not Path(source).is_dir():
        return [str(folder)]
    return [str(folder), _digest(folder / "config.json"), *map(_digest, _weights(source))]


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, kept until it changes."""
    return kept_digest([path], lambda: sha256(path))


def weights_digest(source: str) -> str:
    """Return the SHA-256 of the weights of the model `source`; for several files, that of their digests, one per line.

    It is computed once and kept until the files change (`files.kept_digest`). Raises OSError for a model without
    weights.
    """
    digests = [_digest(path) for path in _weights(source)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _weights(source: str) -> list[Path]:
    """Return the files with the weights, sorted by name."""
    files = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in WEIGHTS)
    path = next((Path(str(file)) for file in files if file), None)
    if path is None:
        raise OSError(f"{source!r} has no weights: none of {', '.join(WEIGHTS)}")
    if path.suffix != ".json":
        return [path]
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    return [Path(str(cached_file(source, shard))) for shard in sorted(set(shards))]


def _convert(source: str, dtype: str, model_class: Any, place: Path) -> None:
    """Store the base in `dtype` at `place`; one process does it, and leaves nothing there if it is killed."""

    def build(scratch: Path) -> Path:
        model_class.from_pretrained(source, dtype=dtype).save_pretrained(scratch / "base")
        return scratch / "base"

    try:
        build_once(place, build)
    except (OSError, SafetensorError) as error:
        message = f"cannot store {source!r} in {dtype} in {place.parent}: {error}. Set COPRA_FL_CACHE to another folder"
        raise CacheError(message) from error
