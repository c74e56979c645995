"""Linear mode connectivity: loss and accuracy on the straight line between two adapters.

    factor path     (1-u) A_a + u A_b, (1-u) B_a + u B_b: A and B interpolated separately, as in federated averaging
    product path    (1-u) B_a A_a + u B_b A_b = [(1-u) B_a, u B_b] [A_a; A_b]: exact, at rank 2r

The head is interpolated on both paths. Barriers as in Entezari et al. (arXiv 2110.06296) and Frankle et al.
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
#: (a, b, u) -> the adapter at point u of a path from a to b
Between = Callable[[Adapter, Adapter, float], Adapter]


@dataclass(frozen=True)
class LossPath:
    """Loss and accuracy at the points `u` of a path from one adapter (u = 0) to another (u = 1)."""

    u: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier_entezari(self) -> float:
        """max_u [loss(u) - ((1-u) loss(0) + u loss(1))]; it is 0 at the ends, so the maximum is not negative."""
        u, loss = np.array(self.u), np.array(self.loss)
        return float(np.max(loss - ((1 - u) * loss[0] + u * loss[-1])))

    @property
    def barrier_frankle(self) -> float:
        """max_u loss(u) - (loss(0) + loss(1)) / 2."""
        return max(self.loss) - (self.loss[0] + self.loss[-1]) / 2

    @property
    def midpoint_gap(self) -> float:
        """accuracy(0.5) - mean accuracy of the ends; positive if the midpoint is the better model."""
        return float(np.interp(0.5, self.u, self.accuracy)) - (self.accuracy[0] + self.accuracy[-1]) / 2

    @property
    def facts(self) -> dict[str, Any]:
        """The points, barriers and midpoint gap as plain data for JSON."""
        points = {"u": list(self.u), "loss": list(self.loss), "accuracy": list(self.accuracy)}
        return points | {
            "barrier_entezari": self.barrier_entezari,
            "barrier_frankle": self.barrier_frankle,
            "midpoint_gap": self.midpoint_gap,
        }


def interpolate(a: Adapter, b: Adapter, u: float) -> Adapter:
    """Return (1-u) a + u b, tensor by tensor: exactly a at u = 0 and exactly b at u = 1."""
    if u in (0.0, 1.0):
        return dict(b if u else a)
    return {name: (1 - u) * a[name] + u * b[name] for name in a}


def interpolate_products(a: Adapter, b: Adapter, u: float) -> Adapter:
    """Return the adapter of rank 2r with products (1-u) B_a A_a + u B_b A_b, for the scaling of `a` and `b`."""
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
    """Return sum_i weights_i adapters_i, tensor by tensor: exactly adapter i if weight i is 1 and all others are 0."""
    counted = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight]
    return {name: torch.stack([weight * adapter[name] for adapter, weight in counted]).sum(0) for name in adapters[0]}


def walk(
    evaluate: Callable[[Sequence[Adapter]], Sequence[Metrics]],
    a: Adapter,
    b: Adapter,
    num_points: int,
    between: Between = interpolate,
) -> LossPath:
    """Evaluate `num_points` evenly spaced points of the path from `a` to `b`, ends included, in one call.

    Args:
        evaluate: adapters -> their metrics, at least ``loss`` and ``accuracy``.
        a: the adapter at u = 0.
        b: the adapter at u = 1.
        num_points: number of points.
        between: the path, `interpolate` or `interpolate_products`.
    """
    u = tuple(float(point) for point in np.linspace(0, 1, num_points))
    metrics = evaluate([between(a, b, point) for point in u])
    return LossPath(u, tuple(m["loss"] for m in metrics), tuple(m["accuracy"] for m in metrics))


def merge_gap(average: Metrics, clients: Sequence[Metrics], num_examples: Sequence[float]) -> Metrics:
    """Return the metrics of the average minus the mean of the clients' metrics, weighted by `num_examples`.

    The average is better than the clients' own adapters if the accuracy is positive or the loss negative.
    """
    return {
        name: average[name] - float(np.average([metrics[name] for metrics in clients], weights=num_examples))
        for name in ("loss", "accuracy")
    }
