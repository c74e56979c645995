"""Connectivity-guided average (ours): if clients are linearly mode connected, search along the averaging direction.

    1  average    FedAvg. The barrier of client i is the barrier on the line from its adapter to the average, on the
                  server's validation data (`copra_fl.adapters.interpolation`)
    2  weights    p_i min(1, bound / barrier_i): a client that is not connected has less weight, and is reported. If
                  the mean barrier by these weights is still above the bound, the round is not connected, averaging A
                  and B separately is not sound, and the result is the average of products (`flexlora`)
    3  search     the best of u = 0.5 ... 1.5 on two paths from the old adapter through the new average:
                  factors    old + u (average - old), A and B separately
                  products   best rank r of (1 - u) s B A + u sum_i p_i s B_i A_i; the head as on the other path

All points of step 1 are scored in one call, and all points of step 3 in another. This is no defence against hostile
clients: they are part of the average that barriers are measured to. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from copra_fl.adapters.interpolation import LossPath, Metrics, interpolate, merge_gap
from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import b_of, trained_modules, weighted_sum
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import fedavg, mean
from copra_fl.aggregation.rules.flexlora import best_factors, flexlora
from copra_fl.config import option

#: tensor's name -> (clients,) weights
Weights = Callable[[str], np.ndarray]

#: points of the line from a client (0) to the average (1)
LINE = (0.0, 0.25, 0.5, 0.75, 1.0)
#: steps along the way from the old adapter (0) to the average (1) and beyond; the first of equally good ones is taken
STEPS = (1.0, 0.75, 1.25, 0.5, 1.5)


@dataclass(frozen=True)
class Parameters:
    bound: float = option(0.05, "barrier in loss above which a client does not count as connected", low=0)


def connectivity(round_: Round) -> Outcome:
    """Return the best adapter on the paths through the average of connected clients, else the average of products."""
    parameters: Parameters = round_.parameters
    clients = [update.client for update in round_.updates]
    examples = [update.num_examples for update in round_.updates]
    lines = lines_to_average(round_)
    barriers = np.array([line.barrier_entezari for line in lines])
    kept = np.divide(parameters.bound, barriers, out=np.ones_like(barriers), where=barriers > parameters.bound)
    counted = kept * examples if kept.any() else examples
    barrier = float(np.average(barriers, weights=counted))
    notes: dict[str, Any] = {
        "barrier": barrier,
        "barriers": dict(zip(map(str, clients), barriers.tolist(), strict=True)),
        "down_weighted": [client for client, share in zip(clients, kept, strict=True) if share < 1],
        "merge_gap": merge_gap(_end(lines[0], -1), [_end(line, 0) for line in lines], examples),
        "scored": 1 + len(lines) * (len(LINE) - 1),
    }
    if not barrier <= parameters.bound:  # also if the barrier is NaN
        return Outcome(flexlora(round_).adapter, notes=notes | {"path": "fallback", "u": 1.0})

    def weights(name: str) -> np.ndarray:
        shares = round_.weights(name) * kept
        return shares / shares.sum() if shares.any() else shares

    candidates = {("factors", u): on_factors(round_, weights, u) for u in STEPS}
    candidates |= {("products", u): on_products(round_, weights, u) for u in STEPS}
    losses = np.nan_to_num([metrics["loss"] for metrics in round_.score(list(candidates.values()))], nan=np.inf)
    path, u = best = list(candidates)[int(losses.argmin())]
    search = {"path": path, "u": u, "loss": float(losses.min()), "scored": notes["scored"] + len(candidates)}
    return Outcome(candidates[best], notes=notes | search)


def lines_to_average(round_: Round) -> list[LossPath]:
    """Return loss and accuracy on the line from each client's adapter to FedAvg's, all scored in one call."""
    average = fedavg(round_).adapter
    points = [interpolate(client, average, u) for client in round_.adapters for u in LINE[:-1]]
    end, *scored = round_.score([average, *points])
    size = len(LINE) - 1
    lines = [[*scored[start : start + size], end] for start in range(0, len(scored), size)]
    return [LossPath(LINE, tuple(m["loss"] for m in line), tuple(m["accuracy"] for m in line)) for line in lines]


def on_factors(round_: Round, weights: Weights, u: float) -> Adapter:
    """Return old + u (average - old), tensor by tensor."""
    return {
        name: mean(old, [old, *(adapter[name] for adapter in round_.adapters)], _shares(weights(name), u))
        for name, old in round_.before.items()
    }


def on_products(round_: Round, weights: Weights, u: float) -> Adapter:
    """Return the best factors of s B A + u (sum_i p_i s B_i A_i - s B A), with the head of `on_factors`."""
    adapter = on_factors(round_, weights, u)
    for module in trained_modules(round_):
        shares = _shares(weights(b_of(module)), u)
        product = weighted_sum([round_.before, *round_.adapters], shares, module, round_.scaling)
        adapter |= best_factors(round_.before, module, product, round_.scaling)
    return adapter


def _shares(weights: np.ndarray, u: float) -> np.ndarray:
    """Return (1 + clients,) weights of the old adapter and the clients' at step `u`; all old if all weights are 0."""
    return np.array([1 - u * weights.sum(), *(u * weights)])


def _end(line: LossPath, index: int) -> Metrics:
    return {"loss": line.loss[index], "accuracy": line.accuracy[index]}


RULE = Rule(
    "connectivity",
    connectivity,
    Parameters,
    averages=False,
    keeps_factors=False,
    needs_data=True,
    no_several_datasets="it scores each client's adapter on all validation data, but a client has learnt one data set",
)
