"""FlexLoRA: average the products and factorize the average (Bai et al., arXiv 2402.11505).

    B A <- the best rank-r approximation of sum_i p_i B_i A_i,    B = U sqrt(S) / sqrt(s), A = sqrt(S) V^T / sqrt(s)

Computed by QR of the stacked factors and an SVD of the small matrix between them. If the rank of the average is below
r, A keeps its old rows where B = 0, so that they can still be trained: with A = B = 0 all gradients would be 0.
Traffic, up and down: r_i (d + k) per module.
"""

from __future__ import annotations

import torch

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import Factors, a_of, b_of, best_rank, ideal, trained_modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg


def flexlora(round_: Round) -> Outcome:
    """Return the best factors of the average product; modules that no client trained stay unchanged."""
    adapter = fedavg(round_).adapter
    for module in trained_modules(round_):
        adapter |= best_factors(round_.before, module, ideal(round_, module), round_.scaling)
    return Outcome(adapter)


def best_factors(before: Adapter, module: str, product: Factors, scaling: float) -> Adapter:
    """Return the module's A and B of equal norm with s B A as close to `product` as their rank allows."""
    old_a, old_b = before[a_of(module)], before[b_of(module)]
    left, right = product
    b, a = best_rank((left / scaling, right), old_a.shape[0])
    a = torch.where(b.any(dim=0)[:, None], a, old_a.double())
    return {a_of(module): a.to(old_a.dtype), b_of(module): b.to(old_b.dtype)}


RULE = Rule("flexlora", flexlora, unequal_ranks=True, averages=False, keeps_factors=False)
