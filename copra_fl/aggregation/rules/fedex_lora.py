"""FedEx-LoRA: FedAvg, with its error added to W0 (Singhal et al., arXiv 2410.09432). Exact.

    A <- sum_i p_i A_i,    B <- sum_i p_i B_i,    W0 <- W0 + s (sum_i p_i B_i A_i - B A)

The residual is s sum_i p_i (B_i - B)(A_i - A_K) for any one client K, because sum_i p_i (B_i - B) = 0: exact factors
of (K - 1) r columns, without an SVD and without a difference of large products.
Traffic per module: up r (d + k), down r (d + k) + min(d k, (K - 1) r (d + k)).
"""

from __future__ import annotations

from collections.abc import Iterator

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import Factors, a_of, as_residual, b_of, stack, trained_modules
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg


def fedex_lora(round_: Round) -> Outcome:
    """Return the averaged factors, and their difference from the average product as residual."""
    residual: Adapter = {}
    for module in trained_modules(round_):
        residual |= as_residual(module, stack(_terms(round_, module)))
    return Outcome(fedavg(round_).adapter, residual)


def _terms(round_: Round, module: str) -> Iterator[Factors]:
    weights = round_.weights(b_of(module))
    bs = [adapter[b_of(module)].double() for adapter in round_.adapters]
    as_ = [adapter[a_of(module)].double() for adapter in round_.adapters]
    average = sum(float(weight) * b for weight, b in zip(weights, bs, strict=True))
    last = as_[weights.nonzero()[0][-1]]
    for weight, b, a in zip(weights, bs, as_, strict=True):
        yield round_.scaling * float(weight) * (b - average), a - last


RULE = Rule("fedex-lora", fedex_lora, changes_base=True, averages=False)
