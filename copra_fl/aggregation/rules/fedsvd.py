"""FedSVD: train and average B, then refactor B A by its SVD (Lee et al., arXiv 2505.12805). Exact.

    A as it is,    B <- sum_i p_i B_i,    B A = U S V^T,    A <- V^T,    B <- U S

Clients send B; the server sends both factors back. The rows of A are orthonormal after the first round, which bounds
the gradient of B. The first A is drawn as in plain LoRA, as in the authors' code. Their privacy is DP-SGD on each
example at the clients; here it is noise on the average (`copra_fl.aggregation.private`), and the SVD that follows costs
no epsilon. A module whose B is still 0 keeps its A, where the authors' code takes arbitrary singular vectors. The rows
of every A span the same space as those of the first, because clients train B alone: compared with `ffa_lora` they are
rotated and made orthonormal. Traffic per module: up r d, down r (d + k).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import a_of, b_of, signed, trained_modules
from copra_fl.aggregation.ranks import pad
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.aggregation.rules.ffa_lora import trained_parts


def fedsvd(round_: Round) -> Outcome:
    """Return the averaged B's with their A's, refactored; modules that no client trained stay unchanged."""
    return Outcome(orthogonalized(fedavg(round_).adapter, trained_modules(round_)))


def orthogonalized(adapter: Adapter, modules: Iterable[str]) -> Adapter:
    """Return `adapter` with the same products, where the A of each of `modules` has orthonormal rows."""
    factors = dict(adapter)
    for module in modules:
        b, a = adapter[b_of(module)], adapter[a_of(module)]
        if b.any():
            q, t = torch.linalg.qr(a.double().T)
            u, s, vt = torch.linalg.svd(b.double() @ t.T, full_matrices=False)
            left, right = signed(u, vt @ q.T)
            narrow = {b_of(module): (left * s).to(b.dtype), a_of(module): right.to(a.dtype)}
            factors |= pad(narrow, len(a))  # narrower where the rank is above the width of the module
    return factors


RULE = Rule(
    "fedsvd", fedsvd, trains=trained_parts, refactor=orthogonalized, linear=True, averages=False, keeps_factors=False
)
