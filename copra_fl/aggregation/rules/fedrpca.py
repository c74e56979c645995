"""FedRPCA: separate the clients' changes into a common and a sparse part (Jhunjhunwala et al., arXiv 2506.01194).

    M = [vec(theta_1 - theta_0) ... vec(theta_K - theta_0)]         for each A and each B: a column per client
    M = L + S,  (L, S) = argmin ||L||_* + lambda ||S||_1,  lambda = 1 / sqrt(max(rows, columns))       robust PCA
    theta <- theta_0 + sum_i p_i (L_i + beta S_i)

L has a low rank and holds what clients have in common. S is sparse and holds what is specific to a client; an average
divides it by the number of clients, and beta, the parameter ``beta``, makes up for that. With beta = 1 this is FedAvg.

Lambda is the value of Candes et al. (arXiv 0912.3599). The optimum is found by alternating directions: it does not
depend on mu, the step of the method. The paper also chooses beta anew in each round; here it is fixed. The paper's mean
over clients is weighted here, clients of weight 0 have no column, and with a single column, which has nothing in
common with another, beta is 1. The head is averaged. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import part_of
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import mean
from copra_fl.config import option

#: relative change at which the iteration ends, and the number of steps after which it ends anyway
TOLERANCE, MAX_STEPS = 1e-5, 2000
#: over-relaxation of the method of alternating directions; values from 1.5 to 1.8 save about a third of the steps
RELAXATION = 1.7


@dataclass(frozen=True)
class Parameters:
    beta: float = option(2.0, "factor of the sparse part of the clients' changes; 1: fedavg", low=0)


def fedrpca(round_: Round) -> Outcome:
    """Return the old factors plus the clients' mean change with its sparse part scaled; the average of the head."""
    parameters: Parameters = round_.parameters
    adapter = {}
    for name, old in round_.before.items():
        tensors, weights = [client[name] for client in round_.adapters], round_.weights(name)
        if part_of(name) != "head" and np.count_nonzero(weights) > 1:
            tensors = _scaled(old, tensors, weights, parameters.beta)
        adapter[name] = mean(old, tensors, weights)
    return Outcome(adapter)


def _scaled(old: Tensor, tensors: list[Tensor], weights: np.ndarray, beta: float) -> list[Tensor]:
    """Return old + L_i + beta S_i in float64 for each client."""
    start = old.double()
    changes = torch.stack([tensor.double() - start for tensor in tensors]).flatten(1).T.numpy()
    common, counted = np.zeros_like(changes), weights > 0
    common[:, counted] = low_rank_part(changes[:, counted])
    scaled = common + beta * (changes - common)
    return [start + torch.from_numpy(change).view(old.shape) for change in np.ascontiguousarray(scaled.T)]


def low_rank_part(matrix: np.ndarray) -> np.ndarray:
    """Return L of the robust PCA (rows, columns) = L + S of a float64 `matrix`, by principal component pursuit.

    Alternating directions on the augmented Lagrangian (Candes et al., arXiv 0912.3599, algorithm 1).
    """
    if not matrix.any():
        return matrix
    sparsity, mu = max(matrix.shape) ** -0.5, matrix.size / (4 * np.abs(matrix).sum())
    sparse, dual, size = np.zeros_like(matrix), np.zeros_like(matrix), np.linalg.norm(matrix)
    for _ in range(MAX_STEPS):
        low_rank = _shrink_singular_values(matrix - sparse + dual / mu, 1 / mu)
        relaxed = RELAXATION * low_rank + (1 - RELAXATION) * (matrix - sparse)
        remainder, before = matrix - relaxed + dual / mu, sparse
        sparse = remainder - remainder.clip(-sparsity / mu, sparsity / mu)
        dual = dual + mu * (matrix - relaxed - sparse)
        if max(np.linalg.norm(matrix - low_rank - sparse), np.linalg.norm(sparse - before)) <= TOLERANCE * size:
            break
    return low_rank


def _shrink_singular_values(matrix: np.ndarray, threshold: float) -> np.ndarray:
    """Return `matrix` with each singular value reduced by `threshold`, and those below it set to 0.

    A column per client: the columns are few, so the singular values are those of a small Gram matrix.
    """
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    kept = 1 - threshold / np.sqrt(squares.clip(threshold**2))
    return matrix @ ((vectors * kept) @ vectors.T)


RULE = Rule("fedrpca", fedrpca, Parameters)
