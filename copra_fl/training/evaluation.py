"""Loss, accuracy and a task's own metrics of adapters, every gate open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.interpolation import merge_gap
from copra_fl.adapters.state import Adapter
from copra_fl.data.federated import FederatedData
from copra_fl.tasks import Examples, Inputs, Task

#: a batch to (adapters, targets, outputs) logits
Predict = Callable[[Inputs], Tensor]


class Predictor(Protocol):
    """What can be evaluated: `AdaptedModel` takes adapters one after the other, `StackedModel` all at once."""

    task: Task
    device: torch.device

    def predictor(self, adapters: Sequence[Adapter]) -> Predict: ...


def evaluate_each(
    model: Predictor, adapters: Sequence[Adapter], data: FederatedData, indices: np.ndarray, batch_size: int
) -> list[dict[str, Any]]:
    """`evaluate` on held-out examples of `data`; where there are several data sets, on each that `indices` are of.

    Then what is told is the mean over data sets, each counting as much as another, and ``datasets``: each one's own.
    """
    if not data.datasets:
        return list(evaluate(model, adapters, data.examples, indices, batch_size))
    by_dataset = {each.name: own for each in data.datasets if len(own := each.among(indices))}
    found = {name: evaluate(model, adapters, data.examples, own, batch_size) for name, own in by_dataset.items()}
    return [mean_over({name: metrics[number] for name, metrics in found.items()}) for number in range(len(adapters))]


def mean_over(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Metrics by data set as their means, how many ``examples`` they are in all, and as they are in ``datasets``."""
    each = list(datasets.values())
    means = {name: fmean(metrics[name] for metrics in each) for name in each[0]}
    if "examples" in means:
        means["examples"] = sum(metrics["examples"] for metrics in each)
    return {**means, "datasets": dict(datasets)}


def merge_gap_each(
    average: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], num_examples: Sequence[float]
) -> dict[str, Any]:
    """`merge_gap`; with several data sets on each by those clients that were evaluated on it, and the mean of these."""
    if "datasets" not in average:
        return dict(merge_gap(dict(average), [dict(metrics) for metrics in clients], num_examples))
    gaps = {}
    for name, metrics in average["datasets"].items():
        own = [
            (client["datasets"][name], number)
            for client, number in zip(clients, num_examples, strict=True)
            if name in client["datasets"]
        ]
        if own:
            gaps[name] = merge_gap(metrics, *zip(*own, strict=True))
    return mean_over(gaps)


@torch.inference_mode()
def evaluate(
    model: Predictor, adapters: Sequence[Adapter], examples: Examples, indices: np.ndarray, batch_size: int
) -> list[dict[str, float]]:
    """For each adapter its mean loss and accuracy over the targets of `indices`, and how many examples they are.

    Besides, what else the task tells (`Task.metrics`). Examples are taken in order of length, so that little is spent
    on padding, and at most `batch_size` of them at once, counted once for each adapter.
    """
    predict, task = model.predictor(adapters), model.task
    by_length = indices[np.argsort(examples.lengths[indices], kind="stable")]
    at_once = max(1, batch_size // len(adapters))
    loss, correct = torch.zeros(2, len(adapters), dtype=torch.float64, device=model.device)
    for start in range(0, len(by_length), at_once):
        batch = examples.batch(by_length[start : start + at_once], model.device)
        logits = predict(batch)
        loss += torch.stack([task.losses(own, batch) for own in logits]).sum(1)
        correct += torch.stack([task.correct(own, batch) for own in logits]).sum(1)
    means = (torch.stack([loss, correct]) / examples.num_targets[indices].sum()).T.tolist()
    return [
        {"loss": mean, "accuracy": right, "examples": len(indices), **task.metrics(mean, right)}
        for mean, right in means
    ]
