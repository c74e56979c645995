"""Loss and accuracy of adapters, every gate open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.adapter import Adapter
from copra_fl.data import Examples

#: (B, T) token ids and attention mask to (adapters, B, classes) logits
Predict = Callable[[Tensor, Tensor], Tensor]


class Predictor(Protocol):
    """What can be evaluated: `Classifier` takes adapters one after the other, `StackedClassifier` all at once."""

    device: torch.device

    def predictor(self, adapters: Sequence[Adapter]) -> Predict: ...


@torch.inference_mode()
def evaluate(
    model: Predictor, adapters: Sequence[Adapter], examples: Examples, indices: np.ndarray, batch_size: int
) -> list[dict[str, float]]:
    """For each adapter its mean cross-entropy and accuracy over `indices`, and how many they are.

    Examples are taken in order of length, so that little is spent on padding, and at most `batch_size` of them
    at once, counted once for each adapter.
    """
    predict = model.predictor(adapters)
    by_length = indices[np.argsort(examples.lengths[indices], kind="stable")]
    at_once = max(1, batch_size // len(adapters))
    loss, correct = torch.zeros(2, len(adapters), dtype=torch.float64, device=model.device)
    for start in range(0, len(by_length), at_once):
        batch = examples.batch(by_length[start : start + at_once], model.device)
        logits, labels = predict(batch["input_ids"], batch["attention_mask"]), batch["labels"].expand(len(adapters), -1)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        loss += each.sum(1)
        correct += (logits.argmax(2) == labels).sum(1)
    return [
        {"loss": total / len(indices), "accuracy": right / len(indices), "examples": len(indices)}
        for total, right in zip(loss.tolist(), correct.tolist(), strict=True)
    ]
