"""The model that trains many clients at once: base, stacked adapters, heads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import Tensor, nn

from copra_fl.adapters.state import PEFT_PREFIX, Adapter, Layout, part_of
from copra_fl.models.adapted import AdaptedModel, frozen_head_logits, mask_other_datasets
from copra_fl.tasks import Inputs
from copra_fl.training.stacked.chain import NotStackable, find_chain
from copra_fl.training.stacked.linear import StackedLinear
from copra_fl.training.stacked.step import ClientRows, ForwardContext, Record, Stack, Step, by_client, on_device, places
from copra_fl.training.stacked.trunk import Trunk


class StackedModel:
    """An `AdaptedModel` for many clients at once, on the same base tensors.

    Attributes:
        layout: an adapter as a row: gate group after gate group, in each its A's, B's and R's; then the head.
        size: numbers of weights of the model.
        num_groups: number of gate groups.
        blocks: the base's blocks, in order.
        context: state that the layers share.
    """

    def __init__(self, model: AdaptedModel) -> None:
        """Raises NotStackable if the architecture of `model` cannot be stacked."""
        self.device = model.device
        self.task = model.task
        self.group_of = model.group_of
        self.size = model.size
        self.pooling = model.pooling
        self.context = ForwardContext()
        adapter, group_of = model.trainable, model.group_of
        self._floats = torch.empty(0, dtype=next(iter(adapter.values())).dtype).numpy().dtype
        self.num_groups = len(model.gates.names)
        order = sorted(adapter, key=lambda name: (group_of.get(name, self.num_groups), part_of(name)))
        self.layout = Layout.of({name: adapter[name] for name in order})
        self._tree: Any
        self._tree, self.blocks, self._block_of = self._build(model)

    def spans(self, parts: Collection[str]) -> list[tuple[int, slice]]:
        """Return the gate group and span of the `parts` in a row, neighbors joined; the head's group is num_groups."""
        spans: list[tuple[int, slice]] = []
        for name, span in self.layout.spans.items():
            group = self.group_of.get(name, self.num_groups)
            if part_of(name) not in parts:
                continue
            if spans and spans[-1][0] == group and spans[-1][1].stop == span.start:
                span = slice(spans.pop()[1].start, span.stop)
            spans.append((group, span))
        return spans

    def _build(self, model: AdaptedModel) -> tuple[nn.Module, list[nn.Module], np.ndarray]:
        """Return the base with stacked linear layers and a trunk, its blocks, and the block of each gate group."""
        base = model.base
        shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
        tree = copy.deepcopy(base, shared)
        blocks: list[str] = []
        for name, group in model.gates.group_of.items():
            module: Any = base.get_submodule(name)
            _check(name, module)
            full_name = f"{PEFT_PREFIX}{name}"
            linear = StackedLinear(full_name, module, group, self.context, model.residual_factors)
            tree.set_submodule(name, linear)
            blocks.append(model.gates.layers.of(name))
        inside = [block for block in dict.fromkeys(blocks) if block.split(".")[-1].isdigit()]
        block_lists = {block.rpartition(".")[0] for block in inside}
        if len(block_lists) != 1:
            raise NotStackable(f"its blocks are in {len(block_lists)} lists: {', '.join(sorted(block_lists))}")
        (path,) = block_lists
        modules = list(tree.get_submodule(path).children())
        trunk = Trunk(modules, find_chain(base, path), self.context, model.recomputes_blocks)
        tree.set_submodule(path, nn.ModuleList([trunk]))
        first = blocks.index(inside[0])
        block_of = np.zeros(len(model.gates.names), dtype=int)
        for position, (block, group) in enumerate(zip(blocks, model.gates.group_of.values(), strict=True)):
            outside = 0 if position < first else len(modules)
            block_of[group] = int(block.split(".")[-1]) if block in inside else outside
        return tree.eval(), modules, block_of

    def base_tensors(self) -> list[Tensor]:
        """Return the parameters and buffers of the base."""
        return [*self._tree.parameters(), *self._tree.buffers()]

    def tensor(self, values: Sequence[float] | np.ndarray) -> Tensor:
        """Return `values` on this device, in the adapters' dtype, or as int64 if they are integers."""
        array = np.asarray(values)
        array = array if array.dtype.kind == "i" else array.astype(self._floats)
        return on_device(array, self.device)

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Inputs], Tensor]:
        """Return a function from a batch to (adapters, targets, outputs) logits, with every gate open."""
        number = len(adapters)
        on = np.ones((number, self.num_groups), dtype=bool)
        rows = torch.stack([self.layout.flatten(adapter) for adapter in adapters]).to(self.device)
        step = Step(Stack(self.layout, rows), on, np.zeros(number, int), self.tensor(np.ones(number)))

        def predict(batch: Inputs) -> Tensor:
            repeated = {name: tensor.repeat(number, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
            return self(step, repeated).unflatten(0, (number, -1))

        return predict

    def depth(self, on: np.ndarray) -> np.ndarray:
        """Return (c,) the number of blocks below the lowest active adapter of each row of `on` (c, groups).

        Without an active adapter it is the number of all blocks.
        """
        return np.where(on, self._block_of, len(self.blocks)).min(axis=1, initial=len(self.blocks))

    def __call__(
        self, step: Step, batch: Inputs, rows: ClientRows | None = None, record: Record | None = None
    ) -> Tensor:
        """Return the (targets, outputs) logits of a batch, in float32 or wider.

        Each client of the step has equally many rows. `rows` is needed for dropout, and if clients have different
        numbers of targets. `record` is called with the inputs of the adapters.
        """
        rows = rows or ClientRows()
        with self.context.forward(step, rows, range(len(step)), record):
            output = self._tree.base_model(**self.task.inputs(batch))
        features = self.task.features(output, batch, self.pooling)
        if self.task.trains_head:
            logits = self._heads(step, features, rows.targets)
        else:
            logits = frozen_head_logits(self.task, self._tree, features, batch)
        return mask_other_datasets(logits, batch)

    def _heads(self, step: Step, features: Tensor, targets: np.ndarray | None) -> Tensor:
        """Apply each client's head to the features of its targets."""
        weight, bias = (step.stack.tensors[f"head.{name}"] for name in ("weight", "bias"))
        counts = np.full(len(step), len(features) // len(step)) if targets is None else targets
        logits = torch.baddbmm(bias[:, None], by_client(features, counts), weight.mT)
        return logits.flatten(0, 1).index_select(0, places(counts, self.device))


def _check(name: str, module: Any) -> None:
    """Raise NotStackable unless PEFT's `module` is an unquantized linear layer with plain LoRA."""
    base = module.get_base_layer()
    if type(module) is not lora.Linear or type(base) is not nn.Linear:
        raise NotStackable(f"{name} is a {type(base).__name__} in PEFT's {type(module).__name__}, not a plain Linear")
    if module.lora_variant:
        raise NotStackable(f"{name} has {type(module.lora_variant['default']).__name__}, not plain LoRA")
