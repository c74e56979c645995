"""HetLoRA: adapters of unequal rank, weighted by the norms of their products (Cho et al., arXiv 2401.06432).

    p_i = ||dW_i|| / sum_j ||dW_j||,    ||dW_i|| = Frobenius norm of s B_i A_i over all modules
    A <- sum_i p_i [A_i; 0],    B <- sum_i p_i [B_i 0]

The paper's sparsity-weighted average: the norms replace the numbers of examples. The head has no product and is
weighted by `weighting`. A client of weight 0 for a layer has weight 0 here too.

The paper's rank self-pruning is left out: there a client penalizes the product of the norms of its last rows of A and
columns of B, and lowers its rank if that product has shrunk in training. Here the rank of a client is fixed
(``client-ranks``). Traffic, up and down: r_i (d + k) per module; the adapter is cut to r_i on the way down.
"""

from __future__ import annotations

import numpy as np

from copra_fl.adapters.state import part_of
from copra_fl.aggregation.products import factors, frobenius, modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.zero_pad import padded_mean


def hetlora(round_: Round) -> Outcome:
    """Return the average of padded factors by the norms of their products; by `weighting` if all products are 0."""
    norms = product_norms(round_)

    def weights(name: str) -> np.ndarray:
        by_weighting = round_.weights(name)
        by_norm = norms * (by_weighting > 0)
        return by_weighting if part_of(name) == "head" or not by_norm.any() else by_norm / by_norm.sum()

    return Outcome(
        {
            name: padded_mean(round_, name, old, [adapter[name] for adapter in round_.adapters], weights(name))
            for name, old in round_.before.items()
        },
        notes={"norms": norms.tolist()},
    )


def product_norms(round_: Round) -> np.ndarray:
    """Return (clients,): the Frobenius norm of each client's s B A over all modules."""
    return np.array(
        [
            np.linalg.norm([frobenius(factors(adapter, module, round_.scaling)) for module in modules(round_.before)])
            for adapter in round_.adapters
        ]
    )


RULE = Rule("hetlora", hetlora, unequal_ranks=True)
