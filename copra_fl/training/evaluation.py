"""Evaluate adapters with every gate open: loss, accuracy and the task's own metrics."""

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
    """A model to evaluate adapters with: `AdaptedModel` computes them one after the other, `StackedModel` together."""

    task: Task
    device: torch.device

    def predictor(self, adapters: Sequence[Adapter]) -> Predict: ...


def evaluate_each(
    model: Predictor, adapters: Sequence[Adapter], data: FederatedData, indices: np.ndarray, batch_size: int
) -> list[dict[str, Any]]:
    """Evaluate each adapter on the held-out examples `indices` of `data`.

    With several data sets, the adapter is evaluated on each data set that `indices` belong to. The metrics are then the
    unweighted means over these data sets, and ``datasets`` has the metrics of each.
    """
    if not data.datasets:
        return list(evaluate(model, adapters, data.examples, indices, batch_size))
    by_dataset = {dataset.name: dataset.among(indices) for dataset in data.datasets}
    results = {
        name: evaluate(model, adapters, data.examples, dataset_indices, batch_size)
        for name, dataset_indices in by_dataset.items()
        if len(dataset_indices)
    }
    return [mean_over({name: metrics[number] for name, metrics in results.items()}) for number in range(len(adapters))]


def mean_over(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the means of metrics by data set, the total of ``examples``, and the given metrics as ``datasets``."""
    by_dataset = list(datasets.values())
    means = {name: fmean(metrics[name] for metrics in by_dataset) for name in by_dataset[0]}
    if "examples" in means:
        means["examples"] = sum(metrics["examples"] for metrics in by_dataset)
    return {**means, "datasets": dict(datasets)}


def merge_gap_each(
    average: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], num_examples: Sequence[float]
) -> dict[str, Any]:
    """Return the `merge_gap`; with several data sets the mean of the gaps on each data set, which are in ``datasets``.

    The gap on a data set is over the clients that were evaluated on it.
    """
    if "datasets" not in average:
        return dict(merge_gap(dict(average), [dict(metrics) for metrics in clients], num_examples))
    gaps = {}
    for name, metrics in average["datasets"].items():
        evaluated = [
            (client["datasets"][name], number)
            for client, number in zip(clients, num_examples, strict=True)
            if name in client["datasets"]
        ]
        if evaluated:
            gaps[name] = merge_gap(metrics, *zip(*evaluated, strict=True))
    return mean_over(gaps)


@torch.inference_mode()
def evaluate(
    model: Predictor, adapters: Sequence[Adapter], examples: Examples, indices: np.ndarray, batch_size: int
) -> list[dict[str, float]]:
    """Return for each adapter its mean ``loss`` and ``accuracy`` over the targets of `indices`, and ``examples``.

    Further metrics are those of `Task.metrics`. Examples are batched in order of length to save padding; a batch has at
    most `batch_size` rows, one for each pair of adapter and example.
    """
    predict, task = model.predictor(adapters), model.task
    by_length = indices[np.argsort(examples.lengths[indices], kind="stable")]
    at_once = max(1, batch_size // len(adapters))
    loss, correct = torch.zeros(2, len(adapters), dtype=torch.float64, device=model.device)
    for start in range(0, len(by_length), at_once):
        batch = examples.batch(by_length[start : start + at_once], model.device)
        logits = predict(batch)
        loss += torch.stack([task.losses(adapter_logits, batch) for adapter_logits in logits]).sum(1)
        correct += torch.stack([task.correct(adapter_logits, batch) for adapter_logits in logits]).sum(1)
    means = (torch.stack([loss, correct]) / examples.num_targets[indices].sum()).T.tolist()
    return [
        {"loss": mean_loss, "accuracy": accuracy, "examples": len(indices), **task.metrics(mean_loss, accuracy)}
        for mean_loss, accuracy in means
    ]
