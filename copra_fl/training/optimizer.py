"""The local optimizer, its learning rates, and its state between rounds.

FedAvg starts each round with a new optimizer. With ``optimizer-state`` AdamW's moments and step counts, or SGD's
momentum, pass from round to round instead. A tensor's state counts only the steps in which the tensor was on, as within
a round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from copra_fl.adapters.state import OptimizerState
from copra_fl.config import TrainingConfig


def make_optimizer(
    training: TrainingConfig, adapters: Iterable[Tensor], heads: Iterable[Tensor], many: bool = False
) -> torch.optim.Optimizer:
    """Return a new optimizer, without moments.

    `many` selects torch's implementation for hundreds of tensors; otherwise torch chooses one for the device.
    """
    choice = many or None
    groups, decay = [{"params": list(adapters)}, {"params": list(heads)}], training.weight_decay
    if training.optimizer == "sgd":  # fused SGD cannot take parameters whose gradients are set at different steps
        return torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, weight_decay=decay, foreach=choice)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=choice)


def set_learning_rates(optimizer: torch.optim.Optimizer, training: TrainingConfig, t: float) -> None:
    """Set the learning rates of adapters and head for progress `t` of the federation."""
    factor = 0.5 * (1 + math.cos(math.pi * t)) if training.lr_schedule == "cosine" else 1.0
    for group, rate in zip(optimizer.param_groups, (training.learning_rate, training.head_learning_rate), strict=True):
        group["lr"] = rate * factor


def write_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: OptimizerState) -> None:
    """Give each of the `parameters` that `state` has values for these values; others stay without moments."""
    for kind, values in state.items():
        for name in values.keys() & parameters.keys():
            parameter = parameters[name]
            is_step = kind == "step" and not optimizer.defaults["fused"]  # torch counts on the CPU unless it is fused
            device = "cpu" if is_step else parameter.device
            optimizer.state[parameter][kind] = values[name].to(device, copy=True)


def read_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerState:
    """Return the state of the `parameters` on the CPU; those that have had no step are not in it."""
    state: OptimizerState = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            state.setdefault(kind, {})[name] = value.to("cpu", copy=True)
    return state
