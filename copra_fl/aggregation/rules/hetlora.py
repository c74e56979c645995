"""HetLoRA's sparsity-weighted average (Cho et al., arXiv 2401.06432): unequal ranks, clients weighted by what they say.

    p_i = ||dW_i|| / sum_j ||dW_j||,    ||dW_i|| = Frobenius norm of s B_i A_i over all modules
    A <- sum_i p_i [A_i; 0],    B <- sum_i p_i [B_i 0]

In place of the number of examples, as in the paper; the head has no product and is weighted as ever. A client that
the weighting leaves out of a layer is left out here too. The paper's self-pruning of ranks is no part of this.
Traffic, up and down: r_i (d + k) a module; going down the adapter is cut to r_i.
"""

from __future__ import annotations

import numpy as np

from copra_fl.adapters.state import part_of
from copra_fl.aggregation.products import factors, frobenius, modules
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.zero_pad import padded_mean


def hetlora(round_: Round) -> Outcome:
    """Padded factors weighted by the norms of their products; by `round_.weights` where all products are 0."""
    norms = product_norms(round_)

    def weights(name: str) -> np.ndarray:
        usual = round_.weights(name)
        by_norm = norms * (usual > 0)
        return usual if part_of(name) == "head" or not by_norm.any() else by_norm / by_norm.sum()

    return Outcome(
        {
            name: padded_mean(round_, name, old, [adapter[name] for adapter in round_.adapters], weights(name))
            for name, old in round_.before.items()
        },
        notes={"norms": norms.tolist()},
    )


def product_norms(round_: Round) -> np.ndarray:
    """(clients,): the norm of each client's s B A over all modules."""
    return np.array(
        [
            np.linalg.norm([frobenius(factors(adapter, module, round_.scaling)) for module in modules(round_.before)])
            for adapter in round_.adapters
        ]
    )
