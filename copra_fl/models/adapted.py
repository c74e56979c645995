"""The model that clients train: a frozen Transformers model with LoRA adapters and a head.

    logits = head(features(body(inputs))),    body, features and head as the task defines them (`copra_fl.tasks`)

The base is always in eval mode, so its own dropout is off, and the result of a client depends only on its adapter, its
data and its named random streams.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from copra_fl.adapters import residual as residuals
from copra_fl.adapters.core import core_matrix
from copra_fl.adapters.state import PEFT_PREFIX, Adapter, part_of
from copra_fl.copra.gates import Gates
from copra_fl.models.flops import ModelSize
from copra_fl.models.own_logits import own_logits
from copra_fl.tasks import Inputs, Task


class AdaptedModel(nn.Module):
    """A base with LoRA adapters, and the task's head on its hidden states.

    Attributes:
        task: the task of the model.
        peft: PEFT's model on the plain base.
        head: the trained linear layer on the features; None if the base's own output layer is the head.
        gates: switches of the adapters, one gate per group.
        group_of: adapter tensor name -> index of its gate group; without the tensors of the head.
        size: numbers of weights, for an estimate of the operations of a step.
        linears: adapted module, as in an adapter tensor's name before ``.lora_`` -> its frozen linear layer.
        recomputes_blocks: whether the backward pass computes blocks again (`recompute_blocks`).
        residual_factors: adapted module -> factors of its residual (`residual.matrices`), for modules that have one.
        device: the device that it computes on.
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
        self.base.config.use_cache = False  # keys and values are cached for text generation only
        self.gates = Gates(self.base, group)
        self._trainable = {
            name.replace(".default.", "."): parameter
            for name, parameter in peft.named_parameters()
            if ".lora_" in name and ".default." in name
        }
        self.group_of = {
            name: self.gates.group_of[name.removeprefix(PEFT_PREFIX).split(".lora_")[0]] for name in self._trainable
        }
        self.size = ModelSize.of(self.base, self.gates, self._trainable, self.group_of, head)
        modules: dict[str, Any] = dict(self.base.named_modules())
        self.linears: dict[str, Any] = {
            f"{PEFT_PREFIX}{name}": modules[name].get_base_layer() for name in self.gates.group_of
        }
        self.recomputes_blocks = False
        self.residual_factors: dict[str, tuple[Tensor, ...]] = {}
        self._hooks: list[Any] = []
        if head is not None:
            self._trainable |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
        self._dropouts = [dropout for module in lora_layers(peft) for dropout in module.lora_dropout.values()]
        self.to(device).eval()

    @property
    def base(self) -> PreTrainedModel:
        """The Transformers model, with PEFT's layers in it."""
        return self.peft.get_base_model()

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the (targets, outputs) logits of a batch of the task's examples, in float32 or wider."""
        output = self.base.base_model(**self.task.inputs(batch))
        features = self.task.features(output, batch, self.pooling)
        logits = (
            self.head(features) if self.head is not None else frozen_head_logits(self.task, self.base, features, batch)
        )
        return mask_other_datasets(logits, batch)

    def losses(self, batch: Inputs) -> Tensor:
        """Return (targets,) the loss of each target of a batch."""
        return self.task.losses(self(**batch), batch)

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Inputs], Tensor]:
        """Return a function from a batch to (adapters, targets, outputs) logits, with every gate open."""

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
        """Store only the inputs of each block for the backward pass, which computes the block again (checkpointing)."""
        self.recomputes_blocks = True
        recompute(self.base, adapted_blocks(self.gates, self.gates.group_of))

    def train_adapters(self, on: bool) -> None:
        """Switch LoRA dropout on or off; the base stays in eval mode."""
        for dropout in self._dropouts:
            dropout.train(on)

    def train_only(self, parts: Collection[str]) -> dict[str, nn.Parameter]:
        """Return the parameters of the `parts` (`part_of`) by name; from now on, the others get no gradient."""
        for name, parameter in self._trainable.items():
            parameter.requires_grad_(part_of(name) in parts)
        self.gates.freeze(parameter for name, parameter in self._trainable.items() if part_of(name) not in parts)
        return {name: parameter for name, parameter in self._trainable.items() if part_of(name) in parts}

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters of adapter and head, by adapter tensor name."""
        return self._trainable

    def read_adapter(self) -> Adapter:
        """Return a copy of adapter and head on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trainable.items()}

    @torch.no_grad()
    def write_adapter(self, adapter: Adapter) -> None:
        """Load `adapter`, which must have every name of `read_adapter`."""
        torch._foreach_copy_(list(self._trainable.values()), [adapter[name] for name in self._trainable])

    @contextmanager
    def fallback(self, adapter: Adapter, scale: float) -> Iterator[None]:
        """Add the product of the frozen `adapter` to each module while its own adapter is off, inside the block.

        It is scaled by `scale` in addition to alpha / r, and has no dropout. An empty `adapter` adds nothing.
        """
        hooks = []
        for module in self.gates.group_of if adapter else ():
            name = f"{PEFT_PREFIX}{module}"
            a, b = (adapter[f"{name}.lora_{part}.weight"].to(self.device) for part in "AB")
            core = core_matrix(adapter, name)
            a = a if core is None else core.to(a) @ a
            layer: Any = self.base.get_submodule(module)
            hooks.append(layer.register_forward_hook(partial(_add_fallback, a, b, scale)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def write_residual(self, residual: Adapter) -> None:
        """Add `residual` (`copra_fl.adapters.residual`) to W0 in every forward pass, in W0's dtype, replacing any
        other.

        Raises ValueError for a module without an adapter.
        """
        modules = residuals.modules(residual)
        if unknown := sorted(set(modules) - self.linears.keys()):
            raise ValueError(f"a residual for {unknown[:3]}, but only {sorted(self.linears)[:3]}, ... have adapters")
        for hook in self._hooks:
            hook.remove()
        self.residual_factors.clear()
        for name in modules:
            matrices = residuals.matrices(residual, name)
            self.residual_factors[name] = tuple(matrix.to(self.device, self.base.dtype) for matrix in matrices)
        self._hook_residual()

    def share_residual(self, other: AdaptedModel) -> None:
        """Add the residual of `other` in every forward pass, replacing any other."""
        for hook in self._hooks:
            hook.remove()
        self.residual_factors = dict(other.residual_factors)
        self._hook_residual()

    def _hook_residual(self) -> None:
        self._hooks = [
            self.linears[name].register_forward_hook(partial(_add_product, matrices))
            for name, matrices in self.residual_factors.items()
        ]


def _add_fallback(a: Tensor, b: Tensor, scale: float, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    if not layer.disable_adapters:
        return output
    scale *= layer.scaling["default"]  # alpha / r, because an adapter that is off is not rescaled
    product = F.linear(F.linear(inputs[0].to(a.dtype), a), b) * scale
    return (output + product).to(output.dtype)


def _add_product(matrices: tuple[Tensor, ...], linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + residuals.product(inputs[0], matrices)


def adapted_blocks(gates: Gates, modules: Iterable[str]) -> list[str]:
    """Return the names of the blocks that the adapted `modules` are in, in the same order."""
    blocks = dict.fromkeys(map(gates.layers.of, modules))
    return [name for name in blocks if name.split(".")[-1].isdigit()]


def recompute(base: nn.Module, blocks: Iterable[str]) -> None:
    """Let each of `blocks` of `base` store only its inputs for the backward pass, which computes it again.

    Transformers' own checkpointing works in training mode only, and the base is in eval mode. A block that no adapter
    needs a gradient of stores nothing, as without checkpointing.
    """
    for name in blocks:
        block = base.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def frozen_head_logits(task: Task, base: PreTrainedModel, features: Tensor, batch: Inputs) -> Tensor:
    """Return the base's own logits, in float32 or wider."""
    logits = task.frozen_logits(base.get_output_embeddings(), features, batch)
    return own_logits(base.config, logits.to(torch.promote_types(logits.dtype, torch.float32)))


def mask_other_datasets(logits: Tensor, batch: Inputs) -> Tensor:
    """Return `logits` with -inf for labels of other data sets than the example's; unchanged with one data set."""
    return logits.masked_fill(~batch["outputs"], -torch.inf) if "outputs" in batch else logits


def lora_layers(peft: nn.Module) -> list[Any]:
    """Return PEFT's LoRA layers in the model."""
    return [module for module in peft.modules() if isinstance(module, LoraLayer)]
