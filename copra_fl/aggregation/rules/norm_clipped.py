"""Norm clipping (Sun et al., arXiv 1911.07963): bound the influence of each client on the average.

    theta <- theta_0 + sum_i p_i min(1, c / ||theta_i - theta_0||) (theta_i - theta_0)

The norm is over a client's whole change, head included: a client that trained more layers has the longer change. c is
``clip-norm``, or the median of the round's norms above 0: a client whose layers were all off has no change. It protects
against large changes, not against wrong directions.
Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copra_fl.adapters.state import difference, norm
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import mean
from copra_fl.config import option


@dataclass(frozen=True)
class Parameters:
    clip_norm: float = option(
        0.0,
        "largest norm of a client's change, longer ones are scaled down; 0: the median of the norms above 0",
        low=0,
    )


def norm_clipped(round_: Round) -> Outcome:
    """Return the old adapter plus the weighted average of the clients' changes, each clipped to the bound."""
    parameters: Parameters = round_.parameters
    wide = {name: tensor.double() for name, tensor in round_.before.items()}
    norms = np.array([norm(difference(adapter, wide)) for adapter in round_.adapters])
    bound = parameters.clip_norm or float(np.median(norms[norms > 0] if norms.any() else norms))
    factors = np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound)
    averaged = {}
    for name, old in round_.before.items():
        clipped = [
            wide[name] + factor * (adapter[name].double() - wide[name])
            for factor, adapter in zip(factors, round_.adapters, strict=True)
        ]
        averaged[name] = mean(old, clipped, round_.weights(name))
    return Outcome(averaged, notes={"clip_norm": bound, "norms": norms.tolist()})


RULE = Rule("norm-clipped", norm_clipped, Parameters, takes_magnitudes=True)
