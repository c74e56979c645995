"""Adapters and clients' updates as plain data: tensor name -> tensor.

Names are PEFT's (``base_model.model.encoder.layer.0...lora_A.weight``), plus ``head.weight`` and ``head.bias`` if the
task trains a head, ``lora_R`` and ``lora_S`` for a matrix R between the factors (`copra_fl.adapters.core`), and
``lora_magnitude_vector`` for DoRA's magnitudes. Tensors are float32 on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Adapter = dict[str, Tensor]

#: what PEFT calls the first model in a `PeftModel`, at the start of its tensors' names
PEFT_PREFIX = "base_model.model."

#: state of a local optimizer: torch's name (``exp_avg``, ``exp_avg_sq``, ``step``, ``momentum_buffer``) -> tensor
#: name -> value
OptimizerState = dict[str, Adapter]


@dataclass(frozen=True)
class Update:
    """Result of a client's local training.

    Attributes:
        client: number of the client.
        adapter: tensors after training, without the gate groups that were never on, which have not moved. Empty on the
            server if the client's tensors are part of a pooled update.
        num_examples: number of the client's training examples.
        active_steps: per gate group, the number of optimizer steps in which it was on; in a pooled update the mean.
        metrics: at least ``loss`` (mean over steps), ``steps``, ``seconds``, ``distance`` (norm of the change) and
            ``flops`` (`training.operations`); with client-depths also ``memory`` (largest number of bytes that autograd
            kept in a step).
        gradient: mean gradient of each tensor over the steps in which it was on; only with control variates.
        optimizer: state of the local optimizer after the training; empty with ``optimizer-state = "fresh"``.
        grams: name of each B in `adapter` -> its Gram matrix (`aggregation.grams`); only if the rule asks for them.
    """

    client: int
    adapter: Adapter
    num_examples: int
    active_steps: tuple[float, ...]
    metrics: dict[str, float]
    gradient: Adapter = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    grams: Adapter = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Position of each tensor of an adapter in one flat row, so that several adapters form one matrix."""

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, adapter: Adapter) -> Layout:
        """Return the layout with the tensors of `adapter` in their order."""
        return cls({name: tensor.shape for name, tensor in adapter.items()})

    @classmethod
    def by_name(cls, adapter: Adapter) -> Layout:
        """Return the layout in alphabetical order, which does not depend on the order of tensors in a model or file."""
        return cls.of(dict(sorted(adapter.items())))

    @cached_property
    def spans(self) -> dict[str, slice]:
        """The slice of the row for each tensor."""
        ends = np.cumsum([shape.numel() for shape in self.shapes.values()]).tolist()
        starts = [0, *ends[:-1]]
        return {name: slice(start, end) for name, start, end in zip(self.shapes, starts, ends, strict=True)}

    def within(self, span: slice) -> Layout:
        """Return the layout of the tensors inside `span` of a row."""
        return Layout({name: shape for name, shape in self.shapes.items() if _is_inside(self.spans[name], span)})

    @property
    def size(self) -> int:
        """Number of values in a row."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, adapter: Adapter) -> Tensor:
        """Return `adapter` as a row (size,)."""
        return torch.cat([adapter[name].reshape(-1) for name in self.shapes] or [torch.empty(0)])

    def unflatten(self, row: Tensor) -> Adapter:
        """Return the adapter in `row` as views of it."""
        return {name: row[self.spans[name]].view(shape) for name, shape in self.shapes.items()}


def _is_inside(inner: slice, outer: slice) -> bool:
    return bool(outer.start <= inner.start and inner.stop <= outer.stop)


def part_of(name: str) -> str:
    """Return the part that tensor `name` belongs to: ``A``, ``B``, ``R``, ``S``, ``m`` (magnitudes) or ``head``."""
    return name.partition(".lora_")[2][:1] or "head"


def by_number(name: str) -> list[tuple[bool, int | str]]:
    """Return a sort key of names that sorts layer 10 after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def parts(adapter: Adapter, selected: Iterable[str]) -> Adapter:
    """Return the tensors of `adapter` that belong to one of the `selected` parts."""
    return {name: tensor for name, tensor in adapter.items() if part_of(name) in selected}


def trained(adapter: Adapter, active_steps: Sequence[float], group_of: Mapping[str, int]) -> Adapter:
    """Return the tensors that training with these active steps can move: the head, and groups that were on."""
    return {name: tensor for name, tensor in adapter.items() if name not in group_of or active_steps[group_of[name]]}


def complete(update: Update, global_adapter: Adapter) -> Adapter:
    """Return the client's complete adapter: tensors that it did not send are those of `global_adapter`."""
    return global_adapter | update.adapter


def draw(adapter: Adapter, stream: torch.Generator) -> Adapter:
    """Draw new factors of the same shapes as PEFT does: A uniform in +-1 / sqrt(columns), B = 0. No head.

    They are drawn in alphabetical order: that of `adapter` is another after a resume.
    """
    factors = {}
    for name, tensor in sorted(parts(adapter, {"A", "B"}).items()):
        bound = tensor.shape[1] ** -0.5 if part_of(name) == "A" else 0.0
        factors[name] = torch.empty_like(tensor).uniform_(-bound, bound, generator=stream)
    return factors


def difference(a: Adapter, b: Adapter) -> Adapter:
    """Return a - b, tensor by tensor."""
    return {name: a[name] - b[name] for name in a}


def norm(adapter: Adapter) -> float:
    """Return the Euclidean norm over all tensors, summed in float64.

    In alphabetical order: that of `adapter` is another after a resume.
    """
    squares = [tensor.double().square().sum() for _, tensor in sorted(adapter.items())]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def join_names(tree: Mapping[str, Any]) -> Adapter:
    """Return the tensors in nested dicts in one dict; a name is the path to the tensor, joined by ``/``."""
    joined: Adapter = {}
    for name, value in tree.items():
        inner = join_names(value) if isinstance(value, dict) else {"": value}
        joined |= {f"{name}/{path}" if path else name: tensor for path, tensor in inner.items()}
    return joined


def split_names(tensors: Adapter) -> dict[str, Any]:
    """Return the nested dicts of which `join_names` made `tensors`."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split("/")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = tensor
    return tree
