"""The frozen base, on disk in the dtype that it computes in, and mapped into memory from there.

Processes that map one file share its pages, so that a further worker costs its adapter and its activations. To
convert while loading would give every process a copy of its own. A base stored in another dtype is therefore
converted once and kept:

    CACHE/bases/DIGEST/           a folder that Transformers' from_pretrained opens
    CACHE/bases/DIGEST.sha256     `weights_digest`; a model's own folder need not be writable
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

from copra_fl.files import CacheError, atomic_write, build_once, cache_dir, digest_of, sha256

transformers_logging.disable_progress_bar()

#: where Transformers looks for weights, in its order; an index names the files of which they are made up
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_base(source: str, dtype: str, attention: str, model_class: Any) -> PreTrainedModel:
    """The model in the folder or of the hub name `source`, with weights in `dtype` that no process owns.

    `model_class` is the Transformers class that opens it, `attention` eager or sdpa; a model that has no sdpa computes
    with eager.
    Raises OSError or ValueError where there is no model, CacheError where it cannot be stored in `dtype`.
    """
    converted = cache_dir() / "bases" / digest_of(_identity(source), dtype, model_class.__name__)
    if not converted.exists():
        base = _open(source, "auto", attention, model_class)
        if base.dtype == getattr(torch, dtype):
            return base
        _convert(source, dtype, model_class, converted)
    base = _open(str(converted), dtype, attention, model_class)
    base.name_or_path = base.config.name_or_path = source  # what PEFT writes beside an adapter
    return base


def open_quantised(source: str, dtype: str, attention: str, model_class: Any, device: torch.device) -> PreTrainedModel:
    """The same with its linear layers in 4 bits on `device`, computing in `dtype`, each process with its own copy.

    Quantised while it loads, as in QLoRA (Dettmers et al., arXiv:2305.14314): NF4, its constants quantised again.
    """
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    settings = {"quantization_config": quantised, "device_map": {"": device}}
    base = _open(source, dtype, attention, model_class, **settings)
    _keep_unpacked(base)
    return base


def _keep_unpacked(base: PreTrainedModel) -> None:
    """Make the 4-bit layers of `base` compute with their weights as they were quantised, on every CPU.

    On a CPU with AVX512-BF16, the first evaluation would make bitsandbytes (0.50.2) repack a layer's weights for a
    fused kernel for good. That kernel has no gradient, so that the next training fails; it rounds to bfloat16 whatever
    `dtype` is; and the packing itself fails where a layer's inputs are no multiple of 64 or its outputs none of 32.
    """
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _open(source: str, dtype: str, attention: str, model_class: Any, **settings: Any) -> PreTrainedModel:
    # Asked for sdpa by name, Transformers raises where a model has none; not asked at all, it takes sdpa if it can.
    wanted = None if attention == "sdpa" else attention
    return model_class.from_pretrained(source, dtype=dtype, attn_implementation=wanted, **settings)


def _identity(source: str) -> list[object]:
    """Changes when the model does: a hub snapshot's folder is named by its commit, other folders by their files."""
    folder = Path(str(cached_file(source, "config.json"))).parent
    if not Path(source).is_dir():
        return [str(folder)]
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [str(folder), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)]


def weights_digest(source: str) -> str:
    """SHA-256 of the weights of the model `source`; of several files that of their digests, one a line.

    Computed once and kept, for as long as the files stay as they are. Raises OSError where there are none.
    """
    kept = cache_dir() / "bases" / f"{digest_of(_identity(source))}.sha256"
    if not kept.exists():
        digests = [sha256(path) for path in _weights(source)]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        kept.parent.mkdir(exist_ok=True)
        atomic_write(kept, digest)
    return kept.read_text(encoding="ascii")


def _weights(source: str) -> list[Path]:
    """The files with the weights, sorted by name."""
    found = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in WEIGHTS)
    path = next((Path(str(name)) for name in found if name), None)
    if path is None:
        raise OSError(f"{source!r} has none of {', '.join(WEIGHTS)}")
    if path.suffix != ".json":
        return [path]
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    return [Path(str(cached_file(source, shard))) for shard in sorted(set(shards))]


def _convert(source: str, dtype: str, model_class: Any, place: Path) -> None:
    """Store the base in `dtype`; one process does it, and one that is killed leaves nothing at `place`."""

    def build(scratch: Path) -> Path:
        model_class.from_pretrained(source, dtype=dtype).save_pretrained(scratch / "base")
        return scratch / "base"

    try:
        build_once(place, build)
    except (OSError, SafetensorError) as error:
        message = f"cannot store {source!r} in {dtype} in {place.parent}: {error}. COPRA_FL_CACHE names another folder"
        raise CacheError(message) from error
