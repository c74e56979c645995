"""FedRot-LoRA: rotate the clients' factors onto the global ones and average (Zhang et al., arXiv 2602.23638).

    Q_i = argmin over orthogonal Q of ||B_i Q - B_ref||^2 + ||Q^T A_i - A_ref||^2
        = U V^T,    U S V^T = SVD of B_i^T B_ref + A_i A_ref^T
    B <- sum_i p_i B_i Q_i,    A <- sum_i p_i Q_i^T A_i

The reference is the adapter from which the clients started. B_i Q_i Q_i^T A_i = B_i A_i, so no client's product
changes. In the first round B_ref = 0, and A_ref alone determines Q_i. The authors' code aligns one of the factors,
fully or partly, by proper rotations; here both factors are aligned at once and fully, and Q may also be a reflection,
which leaves products unchanged too. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.products import a_of, b_of, modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import mean


def fedrot_lora(round_: Round) -> Outcome:
    """Return the average of the rotated factors."""
    aligned = [round_.before | _aligned(update, round_.before) for update in round_.updates]
    return Outcome(
        {
            name: mean(old, [adapter[name] for adapter in aligned], round_.weights(name))
            for name, old in round_.before.items()
        }
    )


def _aligned(update: Update, reference: Adapter) -> Adapter:
    """Return the tensors of `update` in float64, with each module's factors rotated onto `reference`."""
    adapter = {name: tensor.double() for name, tensor in update.adapter.items()}
    for module in modules(update.adapter):
        b, a = b_of(module), a_of(module)
        q = rotation(adapter[b], adapter[a], reference[b].double(), reference[a].double())
        adapter[b], adapter[a] = adapter[b] @ q, q.T @ adapter[a]
    return adapter


def rotation(b: Tensor, a: Tensor, b_ref: Tensor, a_ref: Tensor) -> Tensor:
    """Return the orthogonal Q (r, r) that brings b Q (d, r) and Q^T a (r, k) closest to the reference."""
    u, _, vt = torch.linalg.svd(b.T @ b_ref + a @ a_ref.T)
    return u @ vt


RULE = Rule("fedrot-lora", fedrot_lora)
