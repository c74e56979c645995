"""Stacked training gives each client the adapter of plain PEFT, with less computation."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from copra_fl.training.cohort import slices
from copra_fl.training.evaluation import evaluate
from copra_fl.training.stacked import NotStackable, StackedModel
from tests.support.tiny import Settings
from tests.support.worlds import CASES, World, assert_alike


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_same_adapters_as_plain_peft_after_10_steps(tiny: Settings, changes: Settings) -> None:
    """Oracle: `train_client`, PEFT's modules and one torch optimizer, for each client alone."""
    world = World(tiny | {"local-steps": 10, "num-rounds": 4, "alpha": 1.0} | changes)
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-5)


def test_in_float64_the_difference_is_rounding(tiny: Settings) -> None:
    """With everything in float64 both agree to 12 digits, so the difference in float32 is rounding."""
    world = World(tiny | {"local-steps": 20, "num-rounds": 4, "lora-dropout": 0.2}, double=True)
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-12)


def test_a_bf16_base_stays_within_its_rounding(tiny: Settings) -> None:
    """Products with the base are rounded to 8 bits in another order, so the adapters differ by a bounded amount."""
    world = World(tiny | {"local-steps": 20, "num-rounds": 4, "dtype": "bfloat16"})
    for update in world.together(*range(6)):
        assert {tensor.dtype for tensor in update.adapter.values()} == {torch.float32}
        assert_alike(update, world.alone(update.client), 0.02)


@pytest.mark.parametrize("changes", [{}, {"lora-dropout": 0.3, "local-epochs": 1}])
def test_an_adapter_does_not_depend_on_the_rest_of_the_cohort(tiny: Settings, changes: Settings) -> None:
    world = World(tiny | {"local-steps": 20} | changes)
    together = {update.client: update for update in world.together(*range(6))}
    apart = [*world.together(4), *world.together(5, 0), *world.together(1, 2, 3)]
    for update in apart:
        assert_alike(update, together[update.client], 1e-5)


def test_a_repeated_training_is_bitwise_the_same(tiny: Settings) -> None:
    world = World(tiny | {"lora-dropout": 0.3})
    for first, second in zip(world.together(*range(6)), world.together(*range(6)), strict=True):
        assert all(torch.equal(first.adapter[name], second.adapter[name]) for name in first.adapter)


def test_seconds_include_the_wait_for_the_device(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU computes in the background: the first value that is read waits for it."""
    world = World(tiny)
    read = torch.Tensor.tolist

    def wait(tensor: torch.Tensor) -> object:
        time.sleep(0.5)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", wait)
    started = time.perf_counter()
    (update,) = world.together(0)
    assert time.perf_counter() - started - update.metrics["seconds"] < 0.5


def test_a_client_with_fewer_steps_stops_exactly_there(tiny: Settings) -> None:
    """Later steps of the other clients do not change the adapter of a client that has finished."""
    world = World(tiny | {"local-epochs": 1, "alpha": 0.3, "batch-size": 8})
    steps = {client: len(world.data.train[client]) for client in range(6)}
    longest, shortest = max(steps, key=steps.__getitem__), min(steps, key=steps.__getitem__)
    assert steps[longest] > 2 * steps[shortest]
    together = {update.client: update for update in world.together(longest, shortest)}
    assert together[shortest].metrics["steps"] == -(-steps[shortest] // 8)
    assert_alike(together[shortest], world.alone(shortest), 1e-5)
    assert_alike(together[longest], world.alone(longest), 1e-5)


#: block, whether it is in the graph, number
Rows = list[tuple[int, bool, float]]


class Recorder:
    """Records the rows that each block of the base computes, with and without a graph."""

    def __init__(self, stacked: StackedModel) -> None:
        self.rows: list[tuple[int, bool, int, bool]] = []
        for depth, block in enumerate(stacked.blocks):
            block.register_forward_hook(
                lambda module, args, output, depth=depth: self.rows.append(
                    (depth, torch.is_grad_enabled(), len(output), output.requires_grad)
                )
            )


def blocks_computed(world: World, clients: int, masks: dict[int, list[bool]], monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Train `clients` with `masks` and return the rows that each block computed: block, in the graph, clients."""
    monkeypatch.setattr(
        "copra_fl.copra.schedule.client_masks",
        lambda copra, seed, client, *rest: (np.array([masks[client]]), np.ones(1)),
    )
    recorder = Recorder(world.stacked)
    for update in world.together(*range(clients)):
        assert_alike(update, world.alone(update.client), 1e-5)
        assert list(update.active_steps) == masks[update.client]
    assert all(with_grad == has_grad for _, with_grad, _, has_grad in recorder.rows)
    per_client = world.config.training.batch_size
    return sorted((block, with_grad, rows / per_client) for block, with_grad, rows, _ in recorder.rows)


@pytest.mark.parametrize("off", ["base", "global"])
def test_nothing_below_a_large_clients_lowest_active_adapter_is_in_the_graph(
    tiny: Settings, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients 0, 1, 2 with lowest active layers 1, 2, none; 3 blocks."""
    world = World(tiny | {"local-steps": 1, "off": off, "batch-size": 64})
    masks = {0: [False, True, False], 1: [False, False, True], 2: [False, False, False]}
    without_graph = [(0, False, 3), (1, False, 2), (2, False, 1)]
    assert blocks_computed(world, 3, masks, monkeypatch) == sorted([*without_graph, (1, True, 1), (2, True, 2)])


def test_small_clients_join_the_graph_in_halves(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest active layers of clients 0 to 3 are 1, 2, 2, none. Client 1 joins with 0, and client 3 with 2."""
    world = World(tiny | {"local-steps": 1})
    masks = {0: [False, True, True], 1: [False, False, True], 2: [False, False, True], 3: [False, False, False]}
    assert blocks_computed(world, 4, masks, monkeypatch) == [(0, False, 4), (1, False, 2), (1, True, 2), (2, True, 4)]


def test_slices_bound_the_tokens_of_a_step_and_group_clients_with_similar_numbers_of_steps(tiny: Settings) -> None:
    """4 examples of 16 tokens per client are 64 tokens, so 150 tokens allow two clients at once."""
    flat = tiny | {"local-epochs": 1, "alpha": 0.3}
    world = World(flat | {"step-tokens": 150})
    parts = slices(world.config, world.data, range(6))
    assert [len(part) for part in parts] == [2, 2, 2]
    sizes = [len(world.data.train[client]) for part in parts for client in part]
    assert [-(-size // 4) for size in sizes] == sorted((-(-size // 4) for size in sizes), reverse=True)
    assert [len(part) for part in slices(World(flat | {"step-tokens": 1}).config, world.data, range(6))] == [1] * 6
    assert len(slices(World(flat).config, world.data, range(6))) == 1
    rounded_up = slices(world.config.changed(step_tokens=170), world.data, range(5))
    assert [len(part) for part in rounded_up] == [3, 2], "2.7 clients"


def test_the_memory_of_a_client_has_no_copy_of_the_adapters(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step sorts its clients by their lowest active layer. Sorted already, they need no copy of their adapters."""
    world = World(tiny | {"local-steps": 1, "client-depths": "3,3,3,3,3,3"})
    masks = {client: [client < 1, client < 2, True] for client in range(3)}
    monkeypatch.setattr(
        "copra_fl.copra.schedule.client_masks",
        lambda copra, seed, client, *rest: (np.array([masks[client]]), np.ones(1)),
    )
    sorted_already, sorted_by_the_step = world.together(0, 1, 2), world.together(2, 1, 0)
    assert len({update.metrics["memory"] for update in [*sorted_already, *sorted_by_the_step]}) == 1


def test_clients_of_one_depth_share_a_slice(tiny: Settings) -> None:
    world = World(tiny | {"client-depths": "1,3,1,2,3,1"})
    assert slices(world.config, world.data, range(6)) == [(0, 2, 5), (3,), (1, 4)]


def test_many_adapters_evaluated_together_get_the_metrics_of_each_alone(tiny: Settings) -> None:
    """Oracle: the PEFT model with one adapter after the other."""
    world = World(tiny)
    adapters = [world.start, *(world.start | update.adapter for update in world.together(0, 1, 2))]
    indices = world.data.server_validation
    stacked, plain = (evaluate(m, adapters, world.data.examples, indices, 20) for m in (world.stacked, world.plain))
    for one, other in zip(stacked, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert len({metrics["loss"] for metrics in stacked}) == 4


def test_a_model_that_cannot_be_stacked_is_refused_with_the_reason(tiny: Settings) -> None:
    world = World(tiny)
    module = world.plain.peft.base_model.model.encoder.layer[1].attention.self.query
    module.base_layer = nn.Bilinear(2, 2, 2)
    with pytest.raises(NotStackable, match=r"encoder.layer.1.attention.self.query is a Bilinear in PEFT's Linear"):
        StackedModel(world.plain)
