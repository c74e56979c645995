"""FLoRA: stacking (Wang et al., arXiv 2409.05976). Exact for any ranks; W0 changes and adapters start anew.

    W0 <- W0 + s [p_1 B_1 ... p_K B_K] [A_1; ...; A_K],    next adapter: A drawn anew, B = 0

Traffic: up r_i (d + k) a module, down as much for the new adapter and (sum_i r_i)(d + k), or d k if that is less.
"""

from __future__ import annotations

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import as_residual, ideal, names, trained_modules
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.fedavg import fedavg


def flora(round_: Round) -> Outcome:
    """The clients' products go into W0 as they are; modules that nobody trained keep their adapter."""
    adapter, fresh = fedavg(round_).adapter, round_.fresh()
    residual: Adapter = {}
    for module in trained_modules(round_):
        residual |= as_residual(module, ideal(round_, module))
        adapter |= {name: fresh[name] for name in names(fresh, module)}
    return Outcome(adapter, residual)
