"""LoRA-FAIR: FedAvg with B corrected towards the average product (Bian et al., arXiv 2411.14961).

    frobenius   dB = argmin ||dW* / s - (B + dB) A||^2 + lambda m ||dB||^2 = E A^T (A A^T + lambda m I)^-1
    cosine      dB = argmin 1 - cos(dW*, (B + dB) A) + lambda ||dB||^2
    B <- B + dB,    E = dW* / s - B A = sum_i p_i (B_i - B)(A_i - A),    m = trace(A A^T) / r

A and B are the averages, and clients continue from A and B + dB. ``similarity`` selects the distance to dW*. The paper
minimizes the second, by gradient descent. The first takes lengths into account and has a closed form, and lambda, the
parameter ``regularization``, is relative to the mean eigenvalue m of A A^T, so that it means the same for every layer,
rank and initialization. The second is solved by iterating the equation that its gradient is 0. With C = B + dB,
T = dW* A^T / s, q = ||C A|| and w = ||dW* / s||:

    C (<C, T> / q^2 A A^T + 2 lambda q w I) = T + 2 lambda q w B,    <dB, C> = 0

The second equation follows from the first, as a cosine does not depend on lengths; it sets the length of C.
Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copra_fl.aggregation.products import a_of, b_of, frobenius, stack, trained_modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.config import option

#: relative change at which the fixed-point iteration ends, and the number of steps after which it ends anyway
TOLERANCE, MAX_STEPS = 1e-9, 200


@dataclass(frozen=True)
class Parameters:
    regularization: float = option(0.01, "weight lambda of the correction's squared norm", above=0)
    similarity: str = option(
        "frobenius",
        "distance to the average product that is minimized; frobenius: norm of the difference, cosine: 1 - cosine",
        choices=("frobenius", "cosine"),
    )


def lora_fair(round_: Round) -> Outcome:
    """Return the averaged factors with each B corrected."""
    parameters: Parameters = round_.parameters
    corrected = {"frobenius": _closest, "cosine": _most_similar}[parameters.similarity]
    adapter = fedavg(round_).adapter
    for module in trained_modules(round_):
        b, a = b_of(module), a_of(module)
        bs = torch.stack([client[b].double() for client in round_.adapters])
        as_ = torch.stack([client[a].double() for client in round_.adapters])
        weights = torch.from_numpy(round_.weights(b))
        adapter[b] = corrected(bs, as_, weights, parameters.regularization).to(adapter[b].dtype)
    return Outcome(adapter)


def _closest(bs: Tensor, as_: Tensor, weights: Tensor, regularization: float) -> Tensor:
    """Return B + dB (d, r) for bs (clients, d, r), as_ (clients, r, k) and weights (clients,), by Frobenius norm."""
    b, a = _means(bs, as_, weights)
    error = torch.einsum("i,idr,irq->dq", weights, bs - b, (as_ - a) @ a.T)
    gram = a @ a.T
    size = gram.trace() / len(gram)
    if size == 0:
        return b
    return b + torch.linalg.solve(gram + regularization * size * torch.eye(len(gram), dtype=gram.dtype), error.T).T


def _most_similar(bs: Tensor, as_: Tensor, weights: Tensor, regularization: float) -> Tensor:
    """Return B + dB as `_closest` does, by cosine; B where a product is 0 and has no direction."""
    b, a = _means(bs, as_, weights)
    target = torch.einsum("i,idr,irq->dq", weights, bs, as_ @ a.T)
    length = frobenius(stack((weight * b_i, a_i) for weight, b_i, a_i in zip(weights, bs, as_, strict=True)))
    gram, identity = a @ a.T, torch.eye(a.shape[0], dtype=a.dtype)
    corrected = b
    for _ in range(MAX_STEPS):
        squared = ((corrected @ gram) * corrected).sum()
        if squared == 0 or length == 0:
            return b
        pull = 2 * regularization * squared.sqrt() * length
        alignment = (corrected * target).sum() / squared
        before = corrected
        turned = torch.linalg.solve(alignment * gram + pull * identity, (target + pull * b).T).T
        corrected = turned * (b * turned).sum() / turned.square().sum()
        if (corrected - before).norm() <= TOLERANCE * corrected.norm():
            break
    return corrected


def _means(bs: Tensor, as_: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("i,idr->dr", weights, bs), torch.einsum("i,irk->rk", weights, as_)


RULE = Rule("lora-fair", lora_fair, Parameters)
