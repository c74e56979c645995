"""The model a client trains: a frozen Transformers model, LoRA in it, a head on top.

    logits = head(features(body(inputs))),    body and head as the task wants them (`copra_fl.tasks`)

The base stays in eval mode, also in training: its own dropout is off, so that what a
client computes depends on its adapter, its data and its named random streams alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copra_fl.adapters import residual as residuals
from copra_fl.adapters.state import Adapter, part_of
from copra_fl.copra.gates import Gates, group_name
from copra_fl.tasks import Inputs, Task


class AdaptedModel(nn.Module):
    """A base with LoRA, and what a task makes of its hidden states.

    Attributes:
        task: what it learns.
        peft: PEFT's model on the plain base.
        head: the linear layer that is trained on the features; None where the base's own output layer is the head.
        gates: switches the adapters, one gate per group.
        group_of: adapter tensor name -> index of its gate group; a head's tensors have none.
        linears: adapted module, as in an adapter tensor's name before ``.lora_`` -> its frozen linear layer.
        recomputes: whether blocks are computed again in the backward pass (`recompute_blocks`).
        beside: adapted module -> what its residual multiplies x by (`residual.matrices`), where it has one.
        device: where it computes.
    """

    def __init__(
        self, task: Task, peft: PeftModel, head: nn.Linear | None, pooling: str, group: str, device: torch.device
    ) -> None:
        super().__init__()
        self.task = task
        self.peft = peft
        self.head = head
        self.pooling = pooling
        self.device = device
        self.base.config.use_cache = False  # keys and values are for generating text
        self.gates = Gates(self.base, group)
        self._trainable = {
            name.replace(".default.", "."): parameter for name, parameter in peft.named_parameters() if ".lora_" in name
        }
        self.group_of = {
            name: self.gates.group_of[name.removeprefix("base_model.model.").split(".lora_")[0]]
            for name in self._trainable
        }
        self.linears: dict[str, Any] = {
            f"base_model.model.{name}": self.base.get_submodule(name).get_base_layer() for name in self.gates.group_of
        }
        self.recomputes = False
        self.beside: dict[str, tuple[Tensor, ...]] = {}
        self._hooks: list[Any] = []
        if head is not None:
            self._trainable |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
        self._dropouts = [dropout for module in lora_layers(peft) for dropout in module.lora_dropout.values()]
        self.to(device).eval()

    @property
    def base(self) -> Any:
        """The plain base, with PEFT's layers in it."""
        return self.peft.get_base_model()

    def forward(self, **batch: Tensor) -> Tensor:
        """A batch of the task's examples to (targets, outputs) logits, in float32 at least."""
        output = self.base.base_model(**self.task.inputs(batch))
        features = self.task.features(output, batch, self.pooling)
        logits = self.head(features) if self.head is not None else own_head(self.base, features)
        return own_outputs(logits, batch)

    def losses(self, batch: Inputs) -> Tensor:
        """(targets,) the loss of each target of a batch."""
        return self.task.losses(self(**batch), batch)

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Inputs], Tensor]:
        """What gives (adapters, targets, outputs) logits for a batch, every gate open."""

        def predict(batch: Inputs) -> Tensor:
            logits = []
            for adapter in adapters:
                self.write_adapter(adapter)
                logits.append(self(**batch))
            return torch.stack(logits)

        self.gates.open()
        self.train_adapters(False)
        return predict

    def recompute_blocks(self) -> None:
        """From now on each block stores its inputs alone for a backward pass, which computes it again.

        Transformers' own way does so in training mode only, and the base is in eval mode. A block that no adapter needs
        a gradient of stores nothing, as before.
        """
        self.recomputes = True
        for name in dict.fromkeys(group_name(module, "layer") for module in self.gates.group_of):
            if name.split(".")[-1].isdigit():
                block = self.base.get_submodule(name)
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def train_adapters(self, on: bool) -> None:
        """LoRA dropout on or off; the base is in eval mode always."""
        for dropout in self._dropouts:
            dropout.train(on)

    def train_only(self, parts: Collection[str]) -> dict[str, nn.Parameter]:
        """The parameters of the `parts` (`adapter.part_of`), by name; all others get no gradient from now on."""
        for name, parameter in self._trainable.items():
            parameter.requires_grad_(part_of(name) in parts)
        self.gates.frozen = [parameter for name, parameter in self._trainable.items() if part_of(name) not in parts]
        return {name: parameter for name, parameter in self._trainable.items() if part_of(name) in parts}

    def read_adapter(self) -> Adapter:
        """A copy of adapter and head, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trainable.items()}

    @torch.no_grad()
    def write_adapter(self, adapter: Adapter) -> None:
        """Take over `adapter`, which must have every name of `read_adapter`."""
        torch._foreach_copy_(list(self._trainable.values()), [adapter[name] for name in self._trainable])

    def write_residual(self, residual: Adapter) -> None:
        """Let `residual` (`copra_fl.adapters.residual`) act beside W0, in its dtype, in place of any other.

        Raises ValueError for a module that has no adapter.
        """
        modules = residuals.modules(residual)
        if unknown := sorted(set(modules) - self.linears.keys()):
            raise ValueError(f"a residual for {unknown[:3]}, but only {sorted(self.linears)[:3]}, ... have adapters")
        for hook in self._hooks:
            hook.remove()
        self.beside.clear()
        for name in modules:
            matrices = residuals.matrices(residual, name)
            self.beside[name] = tuple(matrix.to(self.device, self.base.dtype) for matrix in matrices)
        self._hooks = [
            self.linears[name].register_forward_hook(partial(_add_product, matrices))
            for name, matrices in self.beside.items()
        ]


def _add_product(matrices: tuple[Tensor, ...], linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + residuals.product(inputs[0], matrices)


def own_head(base: Any, features: Tensor) -> Tensor:
    """The logits that the base's own output layer gives, in float32 at least."""
    logits = base.get_output_embeddings()(features)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def own_outputs(logits: Tensor, batch: Inputs) -> Tensor:
    """`logits` with -inf for the labels of other data sets than each example's own, where there are several."""
    return logits.masked_fill(~batch["outputs"], -torch.inf) if "outputs" in batch else logits


def lora_layers(peft: nn.Module) -> list[Any]:
    return [module for module in peft.modules() if isinstance(module, LoraLayer)]
