"""Gradient checkpointing: the same adapters from less memory, and nothing stored where nothing is learnt."""

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
    "dropout, micro-batches, unequal steps": {
        "lora-dropout": 0.3, "gradient-accumulation": 2, "local-epochs": 1, "local-training": "lora", "alpha": 0.5,
    },
}  # fmt: skip


@pytest.fixture(params=["bert", "llama"])
def settings(tiny: Settings, tiny_llama: str, request: pytest.FixtureRequest) -> Settings:
    llama = {"task": "causal-lm", "model": tiny_llama, "target-modules": "all-linear", "partitioner": "iid"}
    return tiny | {"local-steps": 6} | (llama if request.param == "llama" else {})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_adapters_are_the_same(settings: Settings, changes: Settings) -> None:
    """Both engines: bitwise what they give without."""
    without, world = (World(settings | changes | {"gradient-checkpointing": on}) for on in (False, True))
    for one, other in zip(without.together(*range(6)), world.together(*range(6)), strict=True):
        assert relative_error(one.adapter, other.adapter) == 0 and one.metrics["loss"] == other.metrics["loss"]
    one, other = without.alone(2), world.alone(2)
    assert relative_error(one.adapter, other.adapter) == 0 and one.metrics["loss"] == other.metrics["loss"]


class Kept:
    """A tensor that is kept for the backward pass, for as long as its graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def stored_bytes(forward: Callable[[], Tensor]) -> int:
    """What is kept for the backward pass after `forward`, each memory once."""
    kept: WeakSet[Kept] = WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept.add(found := Kept(tensor))
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        loss = forward()
    assert loss.requires_grad
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in kept}
    return sum(storages.values())


def stacked(world: World, on: list[bool]) -> Callable[[], Tensor]:
    """The loss of one client with the groups `on`."""
    batch = world.data.examples.batch(world.data.train[0][:8])
    stack = Stack(world.stacked.layout, world.stacked.layout.flatten(world.start)[None].clone(), ("A", "B"))
    open_ = np.array([on])
    step = Step(stack, np.zeros(1, int), open_, world.stacked.depth(open_), torch.ones(1))
    return lambda: world.stacked.task.losses(world.stacked(step, batch), batch).mean()


def alone(world: World, on: list[bool]) -> Callable[[], Tensor]:
    """The same in plain PEFT."""
    batch = world.data.examples.batch(world.data.train[0][:8])
    world.plain.write_adapter(world.start)
    world.plain.train_only(("A", "B"))
    world.plain.gates.set(on)
    return lambda: world.plain.losses(batch).mean()


@pytest.mark.parametrize("engine", [stacked, alone])
def test_blocks_store_their_inputs_alone_and_nothing_below_the_lowest_adapter(
    tiny: Settings, tiny_llama: str, engine: Callable[[World, list[bool]], Callable[[], Tensor]]
) -> None:
    """A Llama whose blocks are most of what is kept; an input is 8 x tokens x 32 floats."""
    settings = tiny | {
        "task": "causal-lm",
        "model": tiny_llama,
        "target-modules": "q_proj,v_proj",
        "partitioner": "iid",
    }
    without, world = (World(settings | {"gradient-checkpointing": on}) for on in (False, True))
    masks = [[True] * 3, [False, True, True], [False, False, True]]
    before, after = ([stored_bytes(engine(each, mask)) for mask in masks] for each in (without, world))
    one_input = world.data.examples.batch(world.data.train[0][:8])["input_ids"].numel() * 32 * 4
    assert before[0] > 4 * after[0]
    for stored in (before, after):
        assert stored[0] > stored[1] > stored[2]
    assert after[0] - after[1] <= 2 * one_input
    assert before[0] - before[1] > 8 * one_input
