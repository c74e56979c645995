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
from copra_fl.class_metrics import MAX_CLASSES, metrics_of_counts
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
    model: Predictor,
    adapters: Sequence[Adapter],
    data: FederatedData,
    indices: np.ndarray,
    batch_size: int,
    num_classes: int = 0,
) -> list[dict[str, Any]]:
    """Evaluate each adapter on the held-out examples `indices` of `data`, as `evaluate` does.

    With several data sets, the adapter is evaluated on each data set that `indices` belong to. The metrics are then the
    unweighted means over these data sets, and ``datasets`` has the metrics of each.
    """
    if not data.datasets:
        return evaluate(model, adapters, data.examples, indices, batch_size, num_classes)
    by_dataset = {dataset.name: dataset.among(indices) for dataset in data.datasets}
    results = {
        name: evaluate(model, adapters, data.examples, dataset_indices, batch_size, num_classes)
        for name, dataset_indices in by_dataset.items()
        if len(dataset_indices)
    }
    return [mean_over({name: metrics[number] for name, metrics in results.items()}) for number in range(len(adapters))]


def mean_over(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of metrics by data set, the total of ``examples``, and the given metrics as ``datasets``."""
    by_dataset = list(datasets.values())
    numbers = [name for name, value in by_dataset[0].items() if isinstance(value, int | float)]
    means = {name: fmean(metrics[name] for metrics in by_dataset) for name in numbers}
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
    model: Predictor,
    adapters: Sequence[Adapter],
    examples: Examples,
    indices: np.ndarray,
    batch_size: int,
    num_classes: int = 0,
) -> list[dict[str, Any]]:
    """Return for each adapter its mean ``loss`` and ``accuracy`` over the targets of `indices`, and ``examples``.

    Further metrics are those of `Task.metrics`, and with `num_classes` those of `class_metrics`, for a task with one
    label per target; up to MAX_CLASSES also the matrix ``confusion`` itself. Clients leave `num_classes` out, because
    these tell how many examples of each class they have. Examples are batched in order of length to save padding; a
    batch has at most `batch_size` rows, one for each pair of adapter and example.
    """
    predict, task = model.predictor(adapters), model.task
    by_length = indices[np.argsort(examples.lengths[indices], kind="stable")]
    at_once = max(1, batch_size // len(adapters))
    loss, correct = torch.zeros(2, len(adapters), dtype=torch.float64, device=model.device)
    counts = torch.zeros(len(adapters), 3, num_classes, dtype=torch.int64, device=model.device)
    size = num_classes if num_classes <= MAX_CLASSES else 0
    matrices = torch.zeros(len(adapters), size, size, dtype=torch.int64, device=model.device)
    for start in range(0, len(by_length), at_once):
        batch = examples.batch(by_length[start : start + at_once], model.device)
        logits = predict(batch)
        loss += torch.stack([task.losses(adapter_logits, batch) for adapter_logits in logits]).sum(1)
        correct += torch.stack([task.correct(adapter_logits, batch) for adapter_logits in logits]).sum(1)
        for number, adapter_logits in enumerate(logits) if num_classes else ():
            if (predictions := task.predictions(adapter_logits, batch)) is not None:
                counts[number] += class_counts(predictions, batch["labels"], num_classes)
                if size:
                    matrices[number] += confusion(predictions, batch["labels"], size)
    means = (torch.stack([loss, correct]) / examples.num_targets[indices].sum()).T.tolist()
    return [
        {"loss": mean_loss, "accuracy": accuracy, "examples": len(indices), **task.metrics(mean_loss, accuracy)}
        | (metrics_of_counts(*by_class) if by_class.any() else {})
        | ({"confusion": matrix.tolist()} if matrix.any() else {})
        for (mean_loss, accuracy), by_class, matrix in zip(
            means, counts.cpu().numpy(), matrices.cpu().numpy(), strict=True
        )
    ]


def class_counts(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return (3, C) int64: correct predictions, examples, and predictions of each class."""
    classes = labels[predictions == labels], labels, predictions
    return torch.stack([torch.bincount(each, minlength=num_classes) for each in classes])


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return (C, C) int64: row i, column j counts the examples of class i that are predicted as class j."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)
