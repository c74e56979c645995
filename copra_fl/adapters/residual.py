"""What aggregation has added to the frozen weights W0 so far: kept beside them, never written into them.

    y = x W0^T + s x A^T B^T + x D^T,    D (d, k) as one matrix, or as factors D = D_B D_A where they are smaller

So a base can stay shared, mapped from disk or quantised, and the change travels by itself. By module ``M``:
``M.residual`` (d, k), or ``M.residual_B`` (d, n) and ``M.residual_A`` (n, k); float32, scaling already in it.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.adapters.state import Adapter


def modules(residual: Adapter) -> list[str]:
    """The modules that have changed, sorted."""
    return sorted({name.partition(".residual")[0] for name in residual})


def of(residual: Adapter, module: str) -> Tensor:
    """D (d, k) of a module in float64."""
    if f"{module}.residual" in residual:
        return residual[f"{module}.residual"].double()
    return residual[f"{module}.residual_B"].double() @ residual[f"{module}.residual_A"].double()


def matrices(residual: Adapter, module: str) -> tuple[Tensor, ...]:
    """What x is multiplied by, one after the other, for x D^T: D, or D_A and D_B."""
    if f"{module}.residual" in residual:
        return (residual[f"{module}.residual"],)
    return residual[f"{module}.residual_A"], residual[f"{module}.residual_B"]


def product(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """x D^T (..., d) of x (..., k) and a module's `matrices`."""
    return reduce(F.linear, factors, x)


def fold(adapter: Adapter, residual: Adapter, scaling: float) -> Adapter:
    """The plain adapter, its scaling 1, that does what `adapter`, its core and `residual` do together.

        B = [s B, D_B],  A = [R A; D_A]        a dense D is D I or I D, whichever is the smaller

    Float32, without the head; zeros bring all modules to one rank.
    """
    factors = {}
    for module in [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]:
        b, a = (adapter[f"{module}.lora_{part}.weight"].double() for part in "BA")
        if f"{module}.lora_R.weight" in adapter:
            a = adapter[f"{module}.lora_R.weight"].double() @ a
        more_b, more_a = _factors(residual, module) if _only(residual, module) else (b[:, :0], a[:0])
        factors[module] = torch.cat([scaling * b, more_b], dim=1), torch.cat([a, more_a])
    rank = max(len(a) for _, a in factors.values())
    folded = {}
    for module, (b, a) in factors.items():
        folded[f"{module}.lora_A.weight"] = F.pad(a, (0, 0, 0, rank - len(a))).float()
        folded[f"{module}.lora_B.weight"] = F.pad(b, (0, rank - len(a))).float()
    return folded


def _factors(residual: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """D_B (d, n) and D_A (n, k) of a module in float64, also where D is held as one matrix."""
    *smaller, last = (matrix.double() for matrix in matrices(residual, module))
    if smaller:
        return last, smaller[0]
    d, k = last.shape
    return (last, torch.eye(k).to(last)) if k <= d else (torch.eye(d).to(last), last)


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
