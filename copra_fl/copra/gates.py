"""Switch a model's LoRA adapters on and off, one gate per layer or module.

An adapter that is off is not computed: no forward pass, no gradient, no optimizer step. Multiplying its output by 0
would be a different algorithm, because Adam would still move it by its momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from copra_fl.copra.layer_names import LayerNames


class Gates:
    """The gate groups of `model`, in forward order, initially all on.

    Attributes:
        names: one name per group.
        group_of: LoRA module name -> index of its group.
        layers: names the layer of a module; with `group` "module" each module is a group, else each layer.
    """

    def __init__(self, model: nn.Module, group: str) -> None:
        modules = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self.layers = LayerNames({name: module.out_features for name, module in modules.items()})
        groups = {name: name if group == "module" else self.layers.of(name) for name in modules}
        self.names = list(dict.fromkeys(groups.values()))
        self.group_of = {name: self.names.index(of) for name, of in groups.items()}
        self._modules = [[modules[name] for name, g in self.group_of.items() if g == i] for i in range(len(self.names))]
        self._state = [(True, 1.0)] * len(self.names)
        self._frozen: list[torch.Tensor] = []

    def freeze(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep `tensors` of adapters without a gradient from now on; PEFT gives one to all that is switched on."""
        self._frozen = list(tensors)

    def set(self, mask: Sequence[bool], scale: float = 1.0) -> None:
        """Switch group l on where ``mask[l]``, with `scale` as a factor in addition to alpha / r."""
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
        for tensor in self._frozen:
            tensor.requires_grad_(False)

    def holds(self) -> bool:
        """Return whether every adapter is still on or off as `set` left it; other code can switch adapters too."""
        modules = zip(self._modules, self._state, strict=True)
        return all(module.disable_adapters is not on for group, (on, _) in modules for module in group)

    def open(self) -> None:
        """Switch every group on, unscaled, as for evaluation."""
        self.set([True] * len(self.names))
