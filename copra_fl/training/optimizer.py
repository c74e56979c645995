"""The local optimizer and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from copra_fl.config import TrainingConfig


def make_optimizer(
    training: TrainingConfig, adapters: Iterable[Tensor], heads: Iterable[Tensor], many: bool = False
) -> torch.optim.Optimizer:
    """Return a new optimizer: as in FedAvg, clients start each round without momentum.

    `many` selects torch's implementation for hundreds of tensors.
    """
    groups, decay = [{"params": list(adapters)}, {"params": list(heads)}], training.weight_decay
    if training.optimizer == "sgd":  # fused SGD cannot take parameters whose gradients are set at different steps
        return torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, weight_decay=decay, foreach=many)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=many)


def set_learning_rates(optimizer: torch.optim.Optimizer, training: TrainingConfig, t: float) -> None:
    """Set the learning rates of adapters and head for progress `t` of the federation."""
    factor = 0.5 * (1 + math.cos(math.pi * t)) if training.lr_schedule == "cosine" else 1.0
    for group, rate in zip(optimizer.param_groups, (training.learning_rate, training.head_learning_rate), strict=True):
        group["lr"] = rate * factor
