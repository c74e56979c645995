"""Norm clipping (Sun et al., arXiv 1911.07963): no client moves the average further than others do.

    theta <- theta_0 + sum_i p_i min(1, c / ||theta_i - theta_0||) (theta_i - theta_0)

The norm is over a client's whole change, head included: one that trained more layers has the longer change. c is
clip-norm, or the median of the round's norms. Against large changes, not against wrong directions.
Traffic, up and down: r (d + k) a module.
"""

from __future__ import annotations

import numpy as np

from copra_fl.adapters.state import difference, norm
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.fedavg import mean


def norm_clipped(round_: Round) -> Outcome:
    """The weighted average of the clients' changes, each at most as long as the bound."""
    wide = {name: tensor.double() for name, tensor in round_.before.items()}
    norms = np.array([norm(difference(adapter, wide)) for adapter in round_.adapters])
    bound = round_.settings.clip_norm or float(np.median(norms))
    kept = np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound)
    adapter = {}
    for name, old in round_.before.items():
        clipped = [
            wide[name] + share * (each[name].double() - wide[name])
            for share, each in zip(kept, round_.adapters, strict=True)
        ]
        adapter[name] = mean(old, clipped, round_.weights(name))
    return Outcome(adapter, notes={"clip_norm": bound, "norms": norms.tolist()})
