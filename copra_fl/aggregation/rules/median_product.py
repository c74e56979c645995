"""Coordinate-wise median of products: the median (Yin et al., arXiv 1803.01498) of dW_i = s B_i A_i, in rank r.

    D_jl = median of dW_1jl ... dW_Kjl over the clients that trained the module
    s B A <- the best rank-r approximation of D

B_i A_i = (B_i Q)(Q^-1 A_i), so the factors of equal products can differ, and a median of factors then belongs to none
of them (`median`). D itself has no low rank: the cut to rank r, an SVD, can move an entry out of the clients' range.
The server holds K matrices of d x k values for one module at a time. Unweighted; the head is as in `median`.
Traffic, up and down: r_i (d + k) per module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from copra_fl.adapters.state import trained
from copra_fl.aggregation.products import b_of, factors, modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.flexlora import best_factors
from copra_fl.aggregation.rules.median import median, middle


def median_product(round_: Round) -> Outcome:
    """Return the best factors of the median product of each module, and the median of the head."""
    return Outcome(median(round_).adapter | factors_of_products(round_, middle))


def factors_of_products(round_: Round, center: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the best factors of each trained module's `center` of (clients, d, k) products."""
    adapter: dict[str, Tensor] = {}
    adapters = [trained(update.adapter, update.active_steps, round_.group_of) for update in round_.updates]
    for module in modules(round_.before):
        pairs = [factors(client, module, round_.scaling) for client in adapters if b_of(module) in client]
        if pairs:
            product = center(torch.stack([b @ a for b, a in pairs]))
            identity = torch.eye(product.shape[1], dtype=product.dtype)
            adapter |= best_factors(round_.before, module, (product, identity), round_.scaling)
    return adapter


RULE = Rule("median-product", median_product, unequal_ranks=True, averages=False, keeps_factors=False)
