"""LoRA-FAIR: FedAvg with B corrected towards the average product (Bian et al., arXiv 2411.14961).

    dB = argmin ||dW* / s - (B + dB) A||^2 + lambda m ||dB||^2 = E A^T (A A^T + lambda m I)^-1,    B <- B + dB
    E = dW* / s - B A = sum_i p_i (B_i - B)(A_i - A),    m = trace(A A^T) / r

A and B are the averages. The paper minimizes one minus a cosine by gradient descent; here it is the Frobenius norm,
which has a closed form and takes lengths into account. Lambda, the parameter ``regularization``, is relative to the
mean eigenvalue m of A A^T, so that it means the same for every layer, rank and initialization.
Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copra_fl.aggregation.products import a_of, b_of, trained_modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.config import option


@dataclass(frozen=True)
class Parameters:
    regularization: float = option(0.01, "weight lambda of the correction's squared norm", above=0)


def lora_fair(round_: Round) -> Outcome:
    """Return the averaged factors with each B corrected."""
    parameters: Parameters = round_.parameters
    adapter = fedavg(round_).adapter
    for module in trained_modules(round_):
        b, a = b_of(module), a_of(module)
        corrected = _corrected(
            torch.stack([client[b].double() for client in round_.adapters]),
            torch.stack([client[a].double() for client in round_.adapters]),
            torch.from_numpy(round_.weights(b)),
            parameters.regularization,
        )
        adapter[b] = corrected.to(adapter[b].dtype)
    return Outcome(adapter)


def _corrected(bs: Tensor, as_: Tensor, weights: Tensor, regularization: float) -> Tensor:
    """Return B + dB (d, r) for bs (clients, d, r), as_ (clients, r, k) and weights (clients,)."""
    b, a = torch.einsum("i,idr->dr", weights, bs), torch.einsum("i,irk->rk", weights, as_)
    error = torch.einsum("i,idr,irq->dq", weights, bs - b, (as_ - a) @ a.T)
    gram = a @ a.T
    size = gram.trace() / len(gram)
    if size == 0:
        return b
    return b + torch.linalg.solve(gram + regularization * size * torch.eye(len(gram), dtype=gram.dtype), error.T).T


RULE = Rule("lora-fair", lora_fair, Parameters)
