"""FLoRIST: FLoRA with the stacked adapters cut to their largest singular values (Ramesh and Dass, arXiv 2506.09199).

    [p_1 B_1 ... p_K B_K] [A_1; ...; A_K] = U S V^T,    p = the smallest rank with sum_{j <= p} s_j^2 >= tau sum_j s_j^2
    W0 <- W0 + s U_p S_p V_p^T,    next adapter: A newly drawn, B = 0

tau is the parameter ``threshold``. Each module has its own p, which follows the data; with tau = 1 the rule is FLoRA.
Computed from the stacked factors, never from d x k. The start of the next round is that of the authors' code, which
merges the factors into the base and gives each client a new adapter of its own rank.
Traffic per module: up r_i (d + k); down r_i (d + k) for the new adapter plus p (d + k), or d k if smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import as_residual, best_rank, ideal, names, rank_of_energy, trained_modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.config import option


@dataclass(frozen=True)
class Parameters:
    threshold: float = option(0.9, "share tau of the squared singular values to keep; 1: all of them", above=0, high=1)


def florist(round_: Round) -> Outcome:
    """Return new adapters and the cut products as residual; modules that no client trained keep their adapter."""
    parameters: Parameters = round_.parameters
    adapter, fresh = fedavg(round_).adapter, round_.fresh()
    residual: Adapter = {}
    ranks = {}
    for module in trained_modules(round_):
        product = ideal(round_, module)
        ranks[module] = rank_of_energy(product, parameters.threshold)
        residual |= as_residual(module, best_rank(product, ranks[module]))
        adapter |= {name: fresh[name] for name in names(fresh, module)}
    return Outcome(adapter, residual, notes={"ranks": ranks})


RULE = Rule("florist", florist, Parameters, changes_base=True, unequal_ranks=True, averages=False, keeps_factors=False)
