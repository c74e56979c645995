"""Residual: the sum of all additions of aggregation to the frozen weights W0, stored separately from W0.

    y = x W0^T + s x A^T B^T + x D^T,    D (d, k) as one matrix, or as factors D = D_B D_A if they are smaller

The base can therefore stay shared, memory-mapped or quantized, and only the residual travels. Its tensors for module
``M`` are ``M.residual`` (d, k), or ``M.residual_B`` (d, n) and ``M.residual_A`` (n, k); float32, scaling included.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.adapters.core import core_matrix
from copra_fl.adapters.state import Adapter


def modules(residual: Adapter) -> list[str]:
    """Return the modules with a residual, sorted."""
    return sorted({name.partition(".residual")[0] for name in residual})


def of(residual: Adapter, module: str) -> Tensor:
    """Return D (d, k) of a module in float64."""
    if f"{module}.residual" in residual:
        return residual[f"{module}.residual"].double()
    return residual[f"{module}.residual_B"].double() @ residual[f"{module}.residual_A"].double()


def matrices(residual: Adapter, module: str) -> tuple[Tensor, ...]:
    """Return the matrices that x is multiplied by in turn to get x D^T: D, or D_A and D_B."""
    if f"{module}.residual" in residual:
        return (residual[f"{module}.residual"],)
    return residual[f"{module}.residual_A"], residual[f"{module}.residual_B"]


def product(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Return x D^T (..., d) for x (..., k) and a module's `matrices`."""
    return reduce(F.linear, factors, x)


def fold(adapter: Adapter, residual: Adapter, scaling: float) -> Adapter:
    """Return the plain adapter of scaling 1 that is equivalent to `adapter`, its matrix R and `residual` together.

        B = [s B, D_B],  A = [R A; D_A]        a dense D is D I or I D, whichever is smaller

    Float32, without the head. Modules of smaller rank are padded with zeros to the largest rank.
    """
    factors = {}
    for module in [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]:
        b, a = (adapter[f"{module}.lora_{part}.weight"].double() for part in "BA")
        core = core_matrix(adapter, module)
        a = a if core is None else core @ a
        more_b, more_a = _factors(residual, module) if _only(residual, module) else (b[:, :0], a[:0])
        factors[module] = torch.cat([scaling * b, more_b], dim=1), torch.cat([a, more_a])
    rank = max(len(a) for _, a in factors.values())
    folded = {}
    for module, (b, a) in factors.items():
        folded[f"{module}.lora_A.weight"] = F.pad(a, (0, 0, 0, rank - len(a))).float()
        folded[f"{module}.lora_B.weight"] = F.pad(b, (0, rank - len(a))).float()
    return folded


def _factors(residual: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """Return D_B (d, n) and D_A (n, k) of a module in float64, also if D is stored as one matrix."""
    *smaller, last = (matrix.double() for matrix in matrices(residual, module))
    if smaller:
        return last, smaller[0]
    d, k = last.shape
    return (last, torch.eye(k).to(last)) if k <= d else (torch.eye(d).to(last), last)


def add(residual: Adapter, increment: Adapter) -> Adapter:
    """Return the sum, sorted by name: factors side by side if they are smaller than their product, else the product."""
    total: Adapter = {}
    for module in modules(residual | increment):
        terms = [term for term in (_only(residual, module), _only(increment, module)) if term]
        total |= terms[0] if len(terms) == 1 else _sum(module, *terms)
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
