"""What aggregation has added to the frozen weights W0 so far: kept beside them, never written into them.

    y = x W0^T + s x A^T B^T + x D^T,    D (d, k) as one matrix, or as factors D = D_B D_A where they are smaller

So a base can stay shared, mapped from disk or quantised, and the change travels by itself. By module ``M``:
``M.residual`` (d, k), or ``M.residual_B`` (d, n) and ``M.residual_A`` (n, k); float32, scaling already in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.adapter import Adapter


def modules(residual: Adapter) -> list[str]:
    """The modules that have changed, sorted."""
    return sorted({name.partition(".residual")[0] for name in residual})


def of(residual: Adapter, module: str) -> Tensor:
    """D (d, k) of a module in float64."""
    if f"{module}.residual" in residual:
        return residual[f"{module}.residual"].double()
    return residual[f"{module}.residual_B"].double() @ residual[f"{module}.residual_A"].double()


def add(residual: Adapter, increment: Adapter) -> Adapter:
    """The sum, sorted by name: factors side by side while they are smaller than their product, else the product."""
    total: Adapter = {}
    for module in modules(residual | increment):
        held = [_only(each, module) for each in (residual, increment) if _only(each, module)]
        total |= held[0] if len(held) == 1 else _sum(module, *held)
    return dict(sorted(total.items()))


def _only(residual: Adapter, module: str) -> Adapter:
    return {name: tensor for name, tensor in residual.items() if name.partition(".residual")[0] == module}


def _sum(module: str, residual: Adapter, increment: Adapter) -> Adapter:
    b, a = f"{module}.residual_B", f"{module}.residual_A"
    if b in residual and b in increment:
        (d, n), (m, k) = residual[b].shape, increment[a].shape
        if (n + m) * (d + k) < d * k:
            return {b: torch.cat([residual[b], increment[b]], dim=1), a: torch.cat([residual[a], increment[a]], dim=0)}
    return {f"{module}.residual": (of(residual, module) + of(increment, module)).float()}
