"""The model that many clients train at once: base, stacked adapters, pooling, heads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import Tensor, nn

from copra_fl.adapter import Adapter, Layout, part_of
from copra_fl.gates import group_name
from copra_fl.models import Classifier, pool
from copra_fl.stacked.linear import StackedLinear
from copra_fl.stacked.step import Present, Stack, Step
from copra_fl.stacked.trunk import Trunk


class NotStackable(TypeError):
    """A model whose adapters cannot be stacked, with the reason; it trains one client at a time."""


class StackedClassifier:
    """A `Classifier` for many clients at once, on the same base tensors.

    Attributes:
        layout: a client's adapter as a row: gate group after gate group, in each its A's, B's and R's; then the head.
        num_groups: how many gate groups there are.
        blocks: the base's blocks, in order.
        present: what its layers share.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.device = classifier.device
        self.group_of = classifier.group_of
        self.pooling = classifier.pooling
        self.present = Present()
        adapter, group_of = classifier.read_adapter(), classifier.group_of
        self._floats = adapter["head.weight"].numpy().dtype
        self.num_groups = len(classifier.gates.names)
        order = sorted(adapter, key=lambda name: (group_of.get(name, self.num_groups), part_of(name)))
        self.layout = Layout.of({name: adapter[name] for name in order})
        self._tree: Any
        self._tree, self.blocks, self._block_of = self._build(classifier)

    def spans(self, parts: Collection[str]) -> list[tuple[int, slice]]:
        """Where the `parts` lie in the row, neighbours together, each with its gate group; the head's: num_groups."""
        spans: list[tuple[int, slice]] = []
        for name, span in self.layout.spans.items():
            group = self.group_of.get(name, self.num_groups)
            if part_of(name) not in parts:
                continue
            if spans and spans[-1][0] == group and spans[-1][1].stop == span.start:
                span = slice(spans.pop()[1].start, span.stop)
            spans.append((group, span))
        return spans

    def _build(self, classifier: Classifier) -> tuple[nn.Module, list[nn.Module], np.ndarray]:
        """The base with stacked linear layers and a trunk, its blocks, and the block of each gate group."""
        base = classifier.encoder.get_base_model()
        shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
        tree = copy.deepcopy(base, shared)
        blocks: list[str] = []
        for name, group in classifier.gates.group_of.items():
            module: Any = base.get_submodule(name)
            if type(module) is not lora.Linear or type(module.get_base_layer()) is not nn.Linear or module.lora_variant:
                raise NotStackable(f"{name} is a {type(module.get_base_layer()).__name__} in a {type(module).__name__}")
            linear = StackedLinear(f"base_model.model.{name}", module, group, self.present, classifier.beside)
            tree.set_submodule(name, linear)
            blocks.append(group_name(name, "layer"))
        inside = [block for block in dict.fromkeys(blocks) if block.split(".")[-1].isdigit()]
        trunks = {block.rpartition(".")[0] for block in inside}
        if len(trunks) != 1:
            raise NotStackable(f"its blocks are in {len(trunks)} lists: {', '.join(sorted(trunks))}")
        (trunk,) = trunks
        modules = list(tree.get_submodule(trunk).children())
        tree.set_submodule(trunk, nn.ModuleList([Trunk(modules, self.present)]))
        first = blocks.index(inside[0])
        block_of = np.zeros(len(classifier.gates.names), dtype=int)
        for position, (block, group) in enumerate(zip(blocks, classifier.gates.group_of.values(), strict=True)):
            outside = 0 if position < first else len(modules)
            block_of[group] = int(block.split(".")[-1]) if block in inside else outside
        return tree.eval(), modules, block_of

    def tensor(self, values: Sequence[float] | np.ndarray) -> Tensor:
        """`values` on this device, in the adapters' dtype, or int64 where they are whole numbers."""
        array = np.asarray(values)
        array = array if array.dtype.kind == "i" else array.astype(self._floats)
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives (adapters, B, classes) logits for (B, T) tokens and attention mask, every gate open."""
        number = len(adapters)
        on = np.ones((number, self.num_groups), dtype=bool)
        rows = torch.stack([self.layout.flatten(adapter) for adapter in adapters]).to(self.device)
        step = Step(
            Stack(self.layout, rows), np.arange(number), on, np.zeros(number, int), self.tensor(np.ones(number))
        )

        def predict(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self(step, input_ids.repeat(number, 1), attention_mask.repeat(number, 1))

        return predict

    def depth(self, on: np.ndarray) -> np.ndarray:
        """(c,) blocks below the lowest active adapter of each row of `on` (c, groups); all where none is."""
        return np.where(on, self._block_of, len(self.blocks)).min(axis=1, initial=len(self.blocks))

    def __call__(self, step: Step, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(clients * n, T) tokens to (clients, n, classes) logits in float32."""
        self.present.step, step.live = step, len(step.clients)
        output = self._tree(input_ids=input_ids, attention_mask=attention_mask)
        del self.present.step
        pooler_output = getattr(output, "pooler_output", None)
        features = pool(output.last_hidden_state, attention_mask, self.pooling, pooler_output)
        clients = self.tensor(step.clients)
        weight = step.stack.tensors["head.weight"].index_select(0, clients)
        bias = step.stack.tensors["head.bias"].index_select(0, clients)
        return torch.baddbmm(bias[:, None], features.unflatten(0, (len(clients), -1)), weight.mT)
