"""Linear mode connectivity: is the straight line between two adapters a valley?

The line is the factor path: A, B and head interpolated apart, which is what federated
averaging does. Barriers after Entezari et al. (arXiv 2110.06296) and Frankle et al.
(arXiv 1912.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from copra_fl.adapter import Adapter

Metrics = dict[str, float]


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


def interpolate(a: Adapter, b: Adapter, u: float) -> Adapter:
    """(1-u) a + u b, tensor by tensor: exactly a at 0 and exactly b at 1."""
    if u in (0.0, 1.0):
        return dict(b if u else a)
    return {name: (1 - u) * a[name] + u * b[name] for name in a}


def walk(evaluate: Callable[[Sequence[Adapter]], Sequence[Metrics]], a: Adapter, b: Adapter, num_points: int) -> Path:
    """Evaluate `num_points` evenly spaced points of the line from `a` to `b`, ends included, all at once."""
    u = tuple(float(point) for point in np.linspace(0, 1, num_points))
    metrics = evaluate([interpolate(a, b, point) for point in u])
    return Path(u, tuple(m["loss"] for m in metrics), tuple(m["accuracy"] for m in metrics))


def merge_gap(average: Metrics, clients: Sequence[Metrics], num_examples: Sequence[int]) -> Metrics:
    """Metric of the average minus the weighted mean of the clients' own metrics.

    Better than its parts: accuracy above 0, loss below 0.
    """
    return {
        name: average[name] - float(np.average([metrics[name] for metrics in clients], weights=num_examples))
        for name in ("loss", "accuracy")
    }
