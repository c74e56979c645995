"""LoRA-FAIR: correct B for what averaging factors apart misses (Bian et al., arXiv 2411.14961).

    dB = argmin ||dW* / s - (B + dB) A||^2 + lambda m ||dB||^2 = E A^T (A A^T + lambda m I)^-1,    B <- B + dB
    E = dW* / s - B A = sum_i p_i (B_i - B)(A_i - A),    m = trace(A A^T) / r

A and B are the averages. The paper's distance is one less a cosine, by gradient descent; here it is the Frobenius
norm, which has a closed form and looks at lengths too. Lambda is relative to the mean eigenvalue m of A A^T, so
that it means the same for every layer, rank and initialisation. Traffic, up and down: r (d + k) a module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.aggregation.products import a_of, b_of, trained_modules
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.fedavg import fedavg


def lora_fair(round_: Round) -> Outcome:
    """The averaged factors with each B corrected."""
    adapter = fedavg(round_).adapter
    for module in trained_modules(round_):
        b, a = b_of(module), a_of(module)
        corrected = _corrected(
            torch.stack([each[b].double() for each in round_.adapters]),
            torch.stack([each[a].double() for each in round_.adapters]),
            torch.from_numpy(round_.weights(b)),
            round_.settings.fair_lambda,
        )
        adapter[b] = corrected.to(adapter[b].dtype)
    return Outcome(adapter)


def _corrected(bs: Tensor, as_: Tensor, weights: Tensor, fair_lambda: float) -> Tensor:
    """(d, r) of bs (clients, d, r), as_ (clients, r, k) and weights (clients,)."""
    b, a = torch.einsum("i,idr->dr", weights, bs), torch.einsum("i,irk->rk", weights, as_)
    error = torch.einsum("i,idr,irq->dq", weights, bs - b, (as_ - a) @ a.T)
    gram = a @ a.T
    size = gram.trace() / len(gram)
    if size == 0:
        return b
    return b + torch.linalg.solve(gram + fair_lambda * size * torch.eye(len(gram), dtype=gram.dtype), error.T).T
