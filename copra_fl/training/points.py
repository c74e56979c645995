"""The points at which a step computes the loss, on lines from global adapters to the client's parameters.

    g = sum_k w_k u_k (gradient of the loss at anchor_k + u_k (theta - anchor_k))

Usually the client's parameters theta are the only point: u = w = 1. Two settings change that.

``local-training = "line"`` (ours): the adapters of the point are at u ~ U(0, 1), which each client draws anew in every
step, and the anchor is the start of the round. The head stays at the client's own, and every layer is on.

``gucci-beta`` as beta adds FedGuCci's loss to L(theta) (Li et al., arXiv 2402.18949):

    beta / N sum_j L((theta + anchor_j) / 2),    the anchors are the last N global models

The first anchor is the start of the round; ``gucci-anchors`` is N, 1 in the authors' code, where beta is 0.1. Before
there are N global models, N is their number. The points are at u = 1/2, with the head. What differs: the authors' code
makes an optimizer step with the gradient of L(theta) and then another with that of the second loss, where Adam would
cancel beta; here one step follows the gradient of the sum. Only what a client trains is on the line: adapters and head,
not a whole model. The steps compute everything 1 + N times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from copra_fl.adapters.state import Adapter, part_of
from copra_fl.config import Config
from copra_fl.training.stacked import StackedModel
from copra_fl.training.stacked.step import Step


@dataclass(frozen=True)
class Point:
    """A point on the line and the weight of its loss.

    Attributes:
        adapters: position u of the adapters; 0 is the anchor, 1 the client's parameters.
        head: position of the head.
        weight: factor of the loss at this point.
        anchor: place of the anchor in (start of the round, *`Start.anchors`).
    """

    adapters: float = 1.0
    head: float = 1.0
    weight: float = 1.0
    anchor: int = 0

    def position(self, name: str) -> float:
        """Return the position of tensor `name` of an adapter."""
        return self.head if part_of(name) == "head" else self.adapters


def step_points(config: Config, position: float, num_anchors: int) -> list[Point]:
    """Return the points of one step of a client; the first is the one whose loss is reported.

    `position` is the client's entry of `LocalSteps.positions`, `num_anchors` is 1 without `Start.anchors`.
    """
    beta = config.aggregation.gucci_beta
    halfway = [Point(0.5, 0.5, beta / num_anchors, anchor) for anchor in range(num_anchors)] if beta else []
    return [Point(adapters=position), *halfway]


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], anchor: Adapter, point: Point) -> Iterator[None]:
    """Move `parameters` to `point` on the line from `anchor` inside the block, and back afterwards."""
    values = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if (position := point.position(name)) != 1:
                values[name] = parameter.clone()
                parameter.copy_(torch.lerp(anchor[name].to(parameter), parameter, position))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)


class StackedPoints:
    """The points of the steps of a cohort, one row per client.

    `anchors` (C, P) are the values of the stack before training, and those of each of `Start.anchors`.
    """

    def __init__(self, model: StackedModel, anchors: Sequence[Tensor]) -> None:
        self._model, self._anchors = model, anchors
        self._is_head = torch.zeros(model.layout.size, dtype=torch.bool, device=model.device)
        for _, span in model.spans({"head"}):
            self._is_head[span] = True

    @contextmanager
    def moved(self, step: Step, rows: np.ndarray, points: Sequence[Point]) -> Iterator[Step]:
        """Return `step` with the adapter of each of its clients at its entry of `points`, which have one weight
        and one anchor.

        `rows` are the clients' rows of the anchors. At the end of the block the gradients of that step are added to
        those of `step`.
        """
        if all(point == Point() for point in points):
            yield step
            return
        adapters, heads = (
            self._model.tensor([getattr(point, part) for point in points])[:, None] for part in ("adapters", "head")
        )
        position = torch.where(self._is_head, heads, adapters)
        anchors = self._anchors[points[0].anchor].index_select(0, self._model.tensor(rows))
        there = step.stack.with_values(torch.lerp(anchors, step.stack.values, position))
        yield replace(step, stack=there)
        step.stack.grads.addcmul_(position, there.grads, value=points[0].weight)
