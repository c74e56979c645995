"""Gradient checkpointing: the same adapters with less memory, and nothing stored below the lowest active adapter."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor

from copra_fl.training.stacked.step import Stack, Step
from tests.support.tiny import Settings
from tests.support.worlds import World, relative_error

CASES: dict[str, Settings] = {
    "masks": {"num-rounds": 4},
    "off layers use the start": {"num-rounds": 4, "off": "global"},
    "dropout, micro-batches, unequal steps": {
        "lora-dropout": 0.3, "gradient-accumulation": 2, "local-epochs": 1, "local-training": "lora", "alpha": 0.5,
    },
}  # fmt: skip


@pytest.fixture(params=["bert", "llama"])
def settings(tiny: Settings, tiny_llama: str, request: pytest.FixtureRequest) -> Settings:
    llama = {"task": "causal-lm", "model": tiny_llama, "target-modules": "all-linear", "partitioner": "iid"}
    return tiny | {"local-steps": 6} | (llama if request.param == "llama" else {})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_adapters_are_bitwise_the_same(settings: Settings, changes: Settings) -> None:
    """Oracle: each engine without checkpointing."""
    without, world = (World(settings | changes | {"gradient-checkpointing": on}) for on in (False, True))
    pairs = [*zip(without.together(*range(6)), world.together(*range(6)), strict=True)]
    for expected, update in [*pairs, (without.alone(2), world.alone(2))]:
        assert relative_error(update.adapter, expected.adapter) == 0
        assert update.metrics["loss"] == expected.metrics["loss"]


class Kept:
    """A tensor kept for the backward pass; it is freed with its graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def stored_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes kept for the backward pass after `forward`, counting each storage once."""
    kept: WeakSet[Kept] = WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept.add(holder := Kept(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = forward()
    assert loss.requires_grad
    storages = [holder.tensor.untyped_storage() for holder in kept]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stacked(world: World, on: list[bool]) -> Callable[[], Tensor]:
    """Return the loss of one client in the stacked engine, with the groups `on`."""
    batch = world.data.examples.batch(world.data.train[0][:8])
    stack = Stack(world.stacked.layout, world.stacked.layout.flatten(world.start)[None].clone(), ("A", "B"))
    mask = np.array([on])
    step = Step(stack, mask, world.stacked.depth(mask), torch.ones(1))
    return lambda: world.stacked.task.losses(world.stacked(step, batch), batch).mean()


def alone(world: World, on: list[bool]) -> Callable[[], Tensor]:
    """Return the same loss in plain PEFT."""
    batch = world.data.examples.batch(world.data.train[0][:8])
    world.plain.write_adapter(world.start)
    world.plain.train_only(("A", "B"))
    world.plain.gates.set(on)
    return lambda: world.plain.losses(batch).mean()


@pytest.mark.parametrize("engine", [stacked, alone])
def test_blocks_store_only_their_inputs_and_nothing_below_the_lowest_adapter(
    tiny: Settings, tiny_llama: str, engine: Callable[[World, list[bool]], Callable[[], Tensor]]
) -> None:
    """In this Llama blocks keep most of the memory; an input of a block is 8 x tokens x 32 floats."""
    settings = tiny | {
        "task": "causal-lm",
        "model": tiny_llama,
        "target-modules": "q_proj,v_proj",
        "partitioner": "iid",
    }
    without, world = (World(settings | {"gradient-checkpointing": on}) for on in (False, True))
    masks = [[True] * 3, [False, True, True], [False, False, True]]
    before, after = ([stored_bytes(engine(setup, mask)) for mask in masks] for setup in (without, world))
    one_input = world.data.examples.batch(world.data.train[0][:8])["input_ids"].numel() * 32 * 4
    assert before[0] > 4 * after[0]
    for stored in (before, after):
        assert stored[0] > stored[1] > stored[2]
    assert after[0] - after[1] <= 2 * one_input
    assert before[0] - before[1] > 8 * one_input
