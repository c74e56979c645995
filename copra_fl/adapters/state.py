"""Adapter state: what travels between server and clients, as name -> tensor.

Names are PEFT's own (``base_model.model.encoder.layer.0...lora_A.weight``), plus
``head.weight`` and ``head.bias`` where a task trains a head, and ``lora_R`` for the core of fed-sb. Tensors are float32
on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from copra_fl.files import atomic_write

Adapter = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What a client hands back after its local training.

    Attributes:
        client: its number.
        adapter: its tensors after training. Gate groups that were never on have not moved and are left out.
            Empty on the server where the client's tensors came in a pooled update.
        num_examples: training examples it holds.
        active_steps: per gate group, the optimiser steps in which it was on; in a pooled update their mean.
        metrics: at least ``loss`` (mean over steps), ``steps``, ``seconds`` and ``distance`` (norm of its change).
        gradient: mean of its own gradients over the steps in which each tensor was on; with control variates only.
    """

    client: int
    adapter: Adapter
    num_examples: int
    active_steps: tuple[float, ...]
    metrics: dict[str, float]
    gradient: Adapter = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of an adapter lies in one flat row, so that many adapters are one matrix."""

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, adapter: Adapter) -> Layout:
        """The layout with `adapter`'s tensors in its order."""
        return cls({name: tensor.shape for name, tensor in adapter.items()})

    @classmethod
    def by_name(cls, adapter: Adapter) -> Layout:
        """The layout in alphabetical order: both ends of a wire agree, whatever the order of a model or a file."""
        return cls.of(dict(sorted(adapter.items())))

    @cached_property
    def spans(self) -> dict[str, slice]:
        """The part of the row that belongs to each tensor."""
        ends = np.cumsum([shape.numel() for shape in self.shapes.values()]).tolist()
        starts = [0, *ends[:-1]]
        return {name: slice(start, end) for name, start, end in zip(self.shapes, starts, ends, strict=True)}

    @property
    def size(self) -> int:
        """Values in a row."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, adapter: Adapter) -> Tensor:
        """The row (size,) of `adapter`."""
        return torch.cat([adapter[name].reshape(-1) for name in self.shapes] or [torch.empty(0)])

    def unflatten(self, row: Tensor) -> Adapter:
        """The adapter whose row this is: views of it."""
        return {name: row[self.spans[name]].view(shape) for name, shape in self.shapes.items()}


def part_of(name: str) -> str:
    """Which part of the model the tensor `name` is: factor ``A`` or ``B``, core ``R``, or ``head``."""
    return name.partition(".lora_")[2][:1] or "head"


def by_number(name: str) -> list[tuple[bool, int | str]]:
    """Sorts layer 10 behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def parts(adapter: Adapter, wanted: Iterable[str]) -> Adapter:
    """The tensors of `adapter` that are one of the `wanted` parts."""
    return {name: tensor for name, tensor in adapter.items() if part_of(name) in wanted}


def trained(adapter: Adapter, active_steps: Sequence[float], group_of: Mapping[str, int]) -> Adapter:
    """The tensors that can have moved in a training with these active steps: the head, and groups that were on."""
    return {name: tensor for name, tensor in adapter.items() if name not in group_of or active_steps[group_of[name]]}


def complete(update: Update, global_adapter: Adapter) -> Adapter:
    """The client's whole adapter: what it did not send is as it was in `global_adapter`."""
    return global_adapter | update.adapter


def draw(adapter: Adapter, stream: torch.Generator) -> Adapter:
    """New factors of the same shapes, as PEFT draws them: A uniform within 1 / sqrt(columns), B = 0. No head."""
    factors = {}
    for name, tensor in parts(adapter, {"A", "B"}).items():
        bound = tensor.shape[1] ** -0.5 if part_of(name) == "A" else 0.0
        factors[name] = torch.empty_like(tensor).uniform_(-bound, bound, generator=stream)
    return factors


def difference(a: Adapter, b: Adapter) -> Adapter:
    """a - b, tensor by tensor."""
    return {name: a[name] - b[name] for name in a}


def norm(adapter: Adapter) -> float:
    """Euclidean norm over all tensors, summed in float64."""
    squares = [tensor.double().square().sum() for tensor in adapter.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def save_checkpoint(path: Path, adapter: Adapter, metadata: Mapping[str, str]) -> None:
    """Write `adapter` and `metadata` to a safetensors file that is either whole or not there."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter.items()}
    atomic_write(path, save(tensors, dict(metadata) or None))  # safetensors cannot read back {} without tensors


def load_checkpoint(path: Path) -> tuple[Adapter, dict[str, str]]:
    """The adapter and the metadata of `save_checkpoint`."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
