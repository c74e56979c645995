"""FedRot-LoRA: rotate the clients' factors onto the global ones, then average (Zhang et al., arXiv 2602.23638).

    Q_i = argmin over orthogonal Q of ||B_i Q - B_ref||^2 + ||Q^T A_i - A_ref||^2
        = U V^T,    U S V^T = SVD of B_i^T B_ref + A_i A_ref^T
    B <- sum_i p_i B_i Q_i,    A <- sum_i p_i Q_i^T A_i

The reference is the adapter that the clients started from. B_i Q_i Q_i^T A_i = B_i A_i: no client's model changes,
only what averaging mixes. In the first round B_ref = 0 and A_ref alone aligns them. The authors' code aligns one of
the factors, all or part of the way, and by proper rotations; here it is both at once, all the way, and Q may also
reflect, which leaves products alone just as well. Traffic, up and down: r (d + k) a module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.products import a_of, b_of, modules
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.fedavg import mean


def fedrot_lora(round_: Round) -> Outcome:
    """FedAvg of the rotated factors."""
    aligned = [round_.before | _aligned(update, round_.before) for update in round_.updates]
    return Outcome(
        {
            name: mean(old, [adapter[name] for adapter in aligned], round_.weights(name))
            for name, old in round_.before.items()
        }
    )


def _aligned(update: Update, reference: Adapter) -> Adapter:
    """What the client sent, rotated, in float64."""
    adapter = {name: tensor.double() for name, tensor in update.adapter.items()}
    for module in modules(update.adapter):
        b, a = b_of(module), a_of(module)
        q = rotation(adapter[b], adapter[a], reference[b].double(), reference[a].double())
        adapter[b], adapter[a] = adapter[b] @ q, q.T @ adapter[a]
    return adapter


def rotation(b: Tensor, a: Tensor, b_ref: Tensor, a_ref: Tensor) -> Tensor:
    """Q (r, r) that brings b Q (d, r) and Q^T a (r, k) closest to the reference."""
    u, _, vt = torch.linalg.svd(b.T @ b_ref + a @ a_ref.T)
    return u @ vt
