"""Switch a model's LoRA adapters on and off, layer by layer.

An adapter that is off is not computed at all: no forward, no gradient, no optimiser step.
Multiplying its output by 0 instead would be another algorithm, since Adam would move it
by its momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


def group_name(module_name: str, group: str) -> str:
    """The gate group of a LoRA module: its transformer block, or the module itself.

    >>> group_name("encoder.layer.3.attention.self.query", "layer")
    'encoder.layer.3'
    """
    parts = module_name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module_name if group == "module" or index is None else ".".join(parts[: index + 1])


class Gates:
    """The gate groups of `model`, in forward order, all on at first.

    Attributes:
        names: one name per group.
        group_of: LoRA module name -> index of its group.
        frozen: adapter tensors that get no gradient, though PEFT gives one to whatever is switched on.
    """

    def __init__(self, model: nn.Module, group: str) -> None:
        modules = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self.names = list(dict.fromkeys(group_name(name, group) for name in modules))
        self.group_of = {name: self.names.index(group_name(name, group)) for name in modules}
        self._modules = [[modules[name] for name, g in self.group_of.items() if g == i] for i in range(len(self.names))]
        self.frozen: list[torch.Tensor] = []
        self._state = [(True, 1.0)] * len(self.names)

    def set(self, mask: Sequence[bool], scale: float = 1.0) -> None:
        """Switch group l on where ``mask[l]``; what is on is multiplied by `scale` besides alpha / r."""
        for index, on in enumerate(mask):
            state = (bool(on), scale if on else 1.0)
            if state == self._state[index]:
                continue
            for module in self._modules[index]:
                module.enable_adapters(state[0])
                if state[1] != self._state[index][1]:
                    for adapter in module.active_adapters:
                        module.set_scale(adapter, state[1])
            self._state[index] = state
        for tensor in self.frozen:
            tensor.requires_grad_(False)

    def open(self) -> None:
        """Every group on, unscaled: how models are evaluated, whatever the phase."""
        self.set([True] * len(self.names))
