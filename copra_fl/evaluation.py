"""Loss, accuracy and a task's own metrics of adapters, every gate open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapter import Adapter
from copra_fl.tasks import Examples, Inputs, Task

#: a batch to (adapters, targets, outputs) logits
Predict = Callable[[Inputs], Tensor]


class Predictor(Protocol):
    """What can be evaluated: `AdaptedModel` takes adapters one after the other, `StackedModel` all at once."""

    task: Task
    device: torch.device

    def predictor(self, adapters: Sequence[Adapter]) -> Predict: ...


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
