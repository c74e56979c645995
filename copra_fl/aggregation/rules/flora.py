"""FLoRA: add the stacked adapters to W0 and start new ones (Wang et al., arXiv 2409.05976). Exact for all ranks.

    W0 <- W0 + s [p_1 B_1 ... p_K B_K] [A_1; ...; A_K],    next adapter: A newly drawn, B = 0

Traffic per module: up r_i (d + k); down r_i (d + k) for the new adapter plus (sum_i r_i)(d + k), or d k if smaller.
"""

from __future__ import annotations

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import as_residual, ideal, names, trained_modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg


def flora(round_: Round) -> Outcome:
    """Return new adapters and the clients' products as residual; modules that no client trained keep their adapter."""
    adapter, fresh = fedavg(round_).adapter, round_.fresh()
    residual: Adapter = {}
    for module in trained_modules(round_):
        residual |= as_residual(module, ideal(round_, module))
        adapter |= {name: fresh[name] for name in names(fresh, module)}
    return Outcome(adapter, residual)


RULE = Rule("flora", flora, changes_base=True, unequal_ranks=True, averages=False, keeps_factors=False)
