"""Linear mode connectivity: is the straight line between two adapters a valley?

    factor path     (1-u) A_a + u A_b, (1-u) B_a + u B_b: factors interpolated apart, as federated averaging does
    product path    (1-u) B_a A_a + u B_b A_b = [(1-u) B_a, u B_b] [A_a; A_b]: exact, at rank 2r

The head is interpolated on both. Barriers after Entezari et al. (arXiv 2110.06296) and Frankle et al.
(arXiv 1912.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, part_of

Metrics = dict[str, float]
#: adapters a and b, and u: the adapter at u of a path from a to b
Between = Callable[[Adapter, Adapter, float], Adapter]


@dataclass(frozen=True)
class Path:
    """Loss and accuracy at the points `u` of a line from one adapter (u = 0) to another (u = 1)."""

    u: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier_entezari(self) -> float:
        """max_u [loss(u) - ((1-u) loss(0) + u loss(1))]; 0 at the ends, so never negative."""
        u, loss = np.array(self.u), np.array(self.loss)
        return float(np.max(loss - ((1 - u) * loss[0] + u * loss[-1])))

    @property
    def barrier_frankle(self) -> float:
        """max_u loss(u) - (loss(0) + loss(1)) / 2."""
        return max(self.loss) - (self.loss[0] + self.loss[-1]) / 2

    @property
    def midpoint_gap(self) -> float:
        """accuracy(0.5) - mean accuracy of the ends; above 0 the midpoint is the better model."""
        return float(np.interp(0.5, self.u, self.accuracy)) - (self.accuracy[0] + self.accuracy[-1]) / 2

    @property
    def facts(self) -> dict[str, Any]:
        """Points, barriers and midpoint gap as plain data."""
        points = {"u": list(self.u), "loss": list(self.loss), "accuracy": list(self.accuracy)}
        return points | {
            "barrier_entezari": self.barrier_entezari,
            "barrier_frankle": self.barrier_frankle,
            "midpoint_gap": self.midpoint_gap,
        }


def interpolate(a: Adapter, b: Adapter, u: float) -> Adapter:
    """(1-u) a + u b, tensor by tensor: exactly a at 0 and exactly b at 1."""
    if u in (0.0, 1.0):
        return dict(b if u else a)
    return {name: (1 - u) * a[name] + u * b[name] for name in a}


def interpolate_products(a: Adapter, b: Adapter, u: float) -> Adapter:
    """The adapter of rank 2r whose products are (1-u) B_a A_a + u B_b A_b; its scaling is that of `a` and `b`."""
    point = {}
    for name in a:
        match part_of(name):
            case "A":
                point[name] = torch.cat([a[name], b[name]])
            case "B":
                point[name] = torch.cat([(1 - u) * a[name], u * b[name]], dim=1)
            case _:
                point[name] = interpolate({name: a[name]}, {name: b[name]}, u)[name]
    return point


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """sum_i weights_i adapters_i, tensor by tensor: exactly the one whose weight is 1 where the others' are 0."""
    counted = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight]
    return {name: torch.stack([weight * adapter[name] for adapter, weight in counted]).sum(0) for name in adapters[0]}


def walk(
    evaluate: Callable[[Sequence[Adapter]], Sequence[Metrics]],
    a: Adapter,
    b: Adapter,
    num_points: int,
    between: Between = interpolate,
) -> Path:
    """Evaluate `num_points` evenly spaced points of the path from `a` to `b`, ends included, all at once."""
    u = tuple(float(point) for point in np.linspace(0, 1, num_points))
    metrics = evaluate([between(a, b, point) for point in u])
    return Path(u, tuple(m["loss"] for m in metrics), tuple(m["accuracy"] for m in metrics))


def merge_gap(average: Metrics, clients: Sequence[Metrics], num_examples: Sequence[float]) -> Metrics:
    """Metric of the average minus the weighted mean of the clients' own metrics.

    Better than its parts: accuracy above 0, loss below 0.
    """
    return {
        name: average[name] - float(np.average([metrics[name] for metrics in clients], weights=num_examples))
        for name in ("loss", "accuracy")
    }
