"""Find out whether a base's blocks form a chain, and which of their inputs have one row per example.

    hidden = block(hidden, *inputs)       block after block, all with the same inputs

`trunk` relies on this. Instead of a list of known architectures, the base is run on one example and on two, and the
inputs of its blocks are compared. One number of examples would not suffice: a (T, T) table looks like a mask of T
examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from copra_fl.tasks.images import blank_images

#: length of the examples on which the base is run
NUM_TOKENS = 4


class NotStackable(TypeError):
    """The adapters of the model cannot be stacked, for the reason in the message; it trains one client at a time."""


@dataclass(frozen=True)
class Chain:
    """The common signature of a base's blocks.

    Attributes:
        with_rows: inputs of a block that have one row per example, by position or name; position 0 is the hidden
            states.
        extras: further outputs of a block after the hidden states, all None; None if it returns the hidden states
            alone.
    """

    with_rows: frozenset[int | str]
    extras: tuple[None, ...] | None


@dataclass(frozen=True)
class Call:
    """One call of a block: its inputs by position or name, and its output."""

    block: int
    inputs: dict[Any, Any]
    output: Any

    @property
    def hidden(self) -> Tensor:
        return self.output[0] if isinstance(self.output, tuple) else self.output


def find_chain(base: PreTrainedModel, path: str) -> Chain:
    """Return the chain of the blocks in the list `path` of the Transformers model `base`.

    Raises NotStackable if they do not form one.
    """
    blocks = base.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise NotStackable(f"its blocks in {path} are a {type(blocks).__name__}, not a ModuleList")
    one, two = (_calls(base, blocks, number) for number in (1, 2))
    if [call.block for call in two] != list(range(len(blocks))):
        raise NotStackable(f"its blocks in {path} do not run once each, in order")
    for before, call in pairwise(two):
        if call.inputs.get(0) is not before.hidden:
            raise NotStackable(f"the input of {path}.{call.block} is not the output of {path}.{before.block}")
        for key in (before.inputs.keys() | call.inputs.keys()) - {0}:
            if call.inputs.get(key) is not before.inputs.get(key):
                raise NotStackable(f"{path}.{call.block} and {path}.{before.block} get different inputs ({key})")
    extras = two[0].output[1:] if isinstance(two[0].output, tuple) else None
    if any(extra is not None for extra in extras or ()):
        raise NotStackable(f"its blocks in {path} return more than hidden states")
    keys = two[0].inputs.keys()
    return Chain(frozenset(key for key in keys if _has_rows(key, one[0].inputs[key], two[0].inputs[key])), extras)


def _calls(base: PreTrainedModel, blocks: nn.ModuleList, number: int) -> list[Call]:
    """Run `base` on `number` examples and return the calls of `blocks`."""
    calls: list[Call] = []

    def record(block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(block, {**dict(enumerate(args)), **kwargs}, output))

    hooks = [block.register_forward_hook(partial(record, i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            base.base_model(**_examples(base, number))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _examples(base: PreTrainedModel, number: int) -> dict[str, Tensor]:
    """Return inputs of `number` examples: black images, or texts with padding."""
    if base.main_input_name == "pixel_values":
        return blank_images(base, number)
    if base.main_input_name != "input_ids":
        raise NotStackable(f"its input is {base.main_input_name}, neither text nor images")
    tokens = torch.zeros(number, NUM_TOKENS, dtype=torch.int64, device=base.device)
    mask = torch.ones_like(tokens)
    mask[:, -1] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _has_rows(key: int | str, one: Any, two: Any) -> bool:
    """Return whether an input has one row per example, given its values for one example and for two."""
    shapes = [(a.shape, b.shape) for a, b in zip(_tensors(one), _tensors(two), strict=True) if a.shape != b.shape]
    for a, b in shapes:
        if (len(a), a[:1], b[:1]) != (len(b), (1,), (2,)) or a[1:] != b[1:]:
            raise NotStackable(f"an input of its blocks ({key}) is {tuple(a)} for one example and {tuple(b)} for two")
    return bool(shapes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
