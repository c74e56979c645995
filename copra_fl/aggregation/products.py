"""Products s B A of adapters: their ideal average, its best factors, and the aggregation error of a rule.

    ideal of a module   dW* = sum_i p_i s B_i A_i   (s B_i R_i A_i with a core), as stacked factors, never d x k:
                        [p_1 s B_1 ... p_K s B_K] (d, sum r) times [A_1; ...; A_K] (sum r, k)
    norms and SVDs      L M = Q_L (T_L T_M^T) Q_M^T by two QRs: both can be read off the small core T_L T_M^T

A difference of products is stacked too, [L_1, -L_2] [M_1; M_2], so that equal products differ by rounding errors of
float64 only; squared norms and traces, ||x||^2 - 2 <x, y> + ||y||^2, would be limited to its square root, 1e-8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.core import core_matrix
from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.rule import Outcome, Round

#: (d, n) and (n, k) in float64: the matrix is their product
Factors = tuple[Tensor, Tensor]

#: a change of a product below this share of its norm is float64 rounding
ROUNDING = 1e-12


def modules(adapter: Adapter) -> list[str]:
    """Return the modules that have an adapter, sorted."""
    return sorted(name.partition(".lora_")[0] for name in adapter if ".lora_B." in name)


def names(adapter: Adapter, module: str) -> list[str]:
    """Return the names of a module's tensors."""
    return [name for name in adapter if name.startswith(f"{module}.lora_")]


def trained_modules(round_: Round) -> list[str]:
    """Return the modules that at least one client sent and that have weights above 0; all others stay unchanged."""
    sent = {name for update in round_.updates for name in update.adapter}
    return [
        module
        for module in modules(round_.before)
        if not sent.isdisjoint(names(round_.before, module)) and round_.weights(b_of(module)).any()
    ]


def a_of(module: str) -> str:
    """Return the name of the module's A."""
    return f"{module}.lora_A.weight"


def b_of(module: str) -> str:
    """Return the name of the module's B."""
    return f"{module}.lora_B.weight"


def factors(adapter: Adapter, module: str, scaling: float) -> Factors:
    """Return s B (d, r), or s B R, and A (r, k)."""
    b, core = scaling * adapter[b_of(module)].double(), core_matrix(adapter, module)
    return (b if core is None else b @ core), adapter[a_of(module)].double()


def stack(terms: Iterable[Factors]) -> Factors:
    """Return the factors of the sum of products, side by side, without columns that contribute nothing.

    Such columns come from padding a smaller rank, and from layers that are still 0.
    """
    lefts, rights = zip(*terms, strict=True)
    left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)
    contributes = left.any(dim=0) & right.any(dim=1)
    return left[:, contributes], right[contributes]


def weighted_sum(adapters: Sequence[Adapter], weights: np.ndarray, module: str, scaling: float) -> Factors:
    """Return the factors of sum_i weights_i s B_i A_i."""
    products = [factors(adapter, module, scaling) for adapter in adapters]
    return stack((float(weight) * b, a) for weight, (b, a) in zip(weights, products, strict=True))


def ideal(round_: Round, module: str) -> Factors:
    """Return the factors of sum_i p_i s B_i A_i, or of the old product if no client trained the module."""
    weights = round_.weights(b_of(module))
    if not weights.any():
        return stack([factors(round_.before, module, round_.scaling)])
    return weighted_sum(round_.adapters, weights, module, round_.scaling)


def small_core(product: Factors) -> Tensor:
    """Return T_L T_M^T of a product L M: it has the same singular values."""
    left, right = product
    t_left, t_right = (torch.linalg.qr(factor, mode="r").R for factor in (left, right.T))
    return t_left @ t_right.T


def signed(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular vectors, left (d, n) and right (n, k), with signs that are the same on every machine.

    The largest entry of each left vector is positive.
    """
    signs = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True)))
    return u * signs, vt * signs.T


def frobenius(product: Factors) -> float:
    """Return the Frobenius norm of a product (d, n) (n, k)."""
    return float(torch.linalg.matrix_norm(small_core(product)))


def rank_of_energy(product: Factors, share: float) -> int:
    """Return the smallest rank at which the best approximation has this share of the squared Frobenius norm.

    With a share of 1 it is the rank of the product, and for a product of 0 it is 0.
    """
    energy = torch.linalg.svdvals(small_core(product)).square().cumsum(0)
    return int((energy < share * energy[-1:]).sum()) + 1 if energy.any() else 0


def best_rank(product: Factors, rank: int) -> Factors:
    """Return U sqrt(S) (d, rank) and sqrt(S) V^T (rank, k) of the best approximation, 0 past the product's rank."""
    left, right = product
    (q_left, t_left), (q_right, t_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    u, vt, s = q_left @ u[:, :rank], vt[:rank] @ q_right.T, s[:rank]
    if s.numel():
        s = torch.where(s > s[0] * torch.finfo(s.dtype).eps * max(u.shape[0], vt.shape[1]), s, 0)
        u, vt = signed(u, vt)
    b, a = u.new_zeros(u.shape[0], rank), vt.new_zeros(rank, vt.shape[1])
    b[:, : len(s)], a[: len(s)] = u * s.sqrt(), s.sqrt()[:, None] * vt
    return b, a


def as_residual(module: str, product: Factors) -> Adapter:
    """Return a product as a float32 residual (`adapters.residual`): as factors if they are smaller than the matrix."""
    left, right = product
    (d, n), k = left.shape, right.shape[1]
    if n == 0:
        return {}
    if n * (d + k) < d * k:
        return {f"{module}.residual_B": left.float(), f"{module}.residual_A": right.float()}
    return {f"{module}.residual": (left @ right).float()}


def aggregation_error(round_: Round, outcome: Outcome) -> dict[str, Any]:
    """Return the miss ||dW - dW*|| of a rule, relative to the ideal and to its change; 0 relative to 0.

    dW is the rule's result: s B A (s B R A) plus the addition to W0. With float32 factors ``total`` is at least about
    1e-8.

    Returns:
        ``total``: ||dW - dW*|| / ||dW*|| over all modules. It falls as the adapter grows, with an equal miss.
        ``of_change``: ||dW - dW*|| / ||dW* - s B A|| over all modules, with B and A as before the round. It can be
        compared between runs with different numbers of rounds and steps.
        ``layers``: ``total`` by module.
    """
    errors, norms, changes = {}, {}, {}
    for module in modules(round_.before):
        b, a = product = ideal(round_, module)
        old_b, old_a = factors(round_.before, module, round_.scaling)
        result = [factors(outcome.adapter, module, round_.scaling), *_residual_factors(outcome.residual, module)]
        errors[module], norms[module] = frobenius(stack([*result, (-b, a)])), frobenius(product)
        changes[module] = frobenius(stack([product, (-old_b, old_a)]))
    miss, size, change = (float(np.linalg.norm(list(by_module.values()))) for by_module in (errors, norms, changes))
    return {
        "total": miss / size if size else 0.0,
        "of_change": miss / change if change > ROUNDING * size else 0.0,
        "layers": {module: errors[module] / norms[module] if norms[module] else 0.0 for module in errors},
    }


def _residual_factors(residual: Adapter, module: str) -> list[Factors]:
    if f"{module}.residual" in residual:
        dense = residual[f"{module}.residual"].double()
        return [(dense, torch.eye(dense.shape[1], dtype=torch.float64))]
    if f"{module}.residual_B" in residual:
        return [(residual[f"{module}.residual_B"].double(), residual[f"{module}.residual_A"].double())]
    return []
