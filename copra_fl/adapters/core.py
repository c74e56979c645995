"""The matrix R between the factors of an adapter: W0 + s B R A, with B and A fixed.

    R = diag(s_1 H_1, ..., s_h H_h),    B R A = sum_i s_i B_i H_i A_i,    B = [B_1 ... B_h], A = [A_1; ...; A_h]

Each of the h heads has r / h columns of B and rows of A. ``lora_R`` (r, r / h) has the blocks H_i one under the other,
``lora_S`` (h, 1) their scales s_i. A single head has no scale: R is one full block, H_1. Scales belong to local
training: they start at 1 in each round, and a client folds them into the blocks before it sends these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, part_of


def block_diagonal(blocks: Tensor, scales: Tensor | None = None) -> Tensor:
    """Return R (r, r) of the `blocks` (r, r / h), each times its scale."""
    heads = blocks.split(blocks.shape[1])
    return torch.block_diag(*(heads if scales is None else (s * block for s, block in zip(scales, heads, strict=True))))


def core_matrix(adapter: Adapter, module: str) -> Tensor | None:
    """Return R (r, r) of a module in float64; None for an adapter without."""
    blocks, scales = adapter.get(f"{module}.lora_R.weight"), adapter.get(f"{module}.lora_S.weight")
    return None if blocks is None else block_diagonal(blocks, scales).double()


def fold_scales(adapter: Adapter) -> Adapter:
    """Return the adapter with each block multiplied by its scale, and all scales 1."""
    folded = {}
    for name, scales in adapter.items():
        if part_of(name) == "S":
            blocks = name.replace(".lora_S.", ".lora_R.")
            folded[blocks] = (adapter[blocks].unflatten(0, (len(scales), -1)) * scales[..., None]).flatten(0, 1)
            folded[name] = torch.ones_like(scales)
    return adapter | folded
