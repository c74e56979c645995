"""Loss and accuracy of a classifier, every adapter on."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from copra_fl.data import Examples
from copra_fl.models import Classifier


@torch.inference_mode()
def evaluate(model: Classifier, examples: Examples, indices: np.ndarray, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy and accuracy over `indices`, and how many they are.

    Examples are taken in order of length, so that little is spent on padding.
    """
    model.gates.open()
    model.train_adapters(False)
    by_length = indices[np.argsort(examples.lengths[indices], kind="stable")]
    loss, correct = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = examples.batch(by_length[start : start + batch_size], model.device)
        logits = model(batch["input_ids"], batch["attention_mask"])
        loss += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
        correct += int((logits.argmax(1) == batch["labels"]).sum())
    return {"loss": loss / len(indices), "accuracy": correct / len(indices), "examples": len(indices)}
