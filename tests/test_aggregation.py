"""FedAvg against numbers worked out by hand, invariants of averages, and pooled updates."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from copra_fl.adapters.state import Update, complete, difference, norm, trained
from copra_fl.aggregation import RULES, find_rule, pools
from copra_fl.aggregation.pooling import pool
from copra_fl.aggregation.rule import Round
from copra_fl.aggregation.rules.fedavg import fedavg, weighted_average
from copra_fl.aggregation.weighting import tensor_weights
from copra_fl.config import AggregationConfig, Config
from copra_fl.tensor_files import read_tensors, write_tensors

LINEAR = [rule.name for rule in RULES if rule.linear]
GROUP_OF = {"a": 0, "b": 1}


def update(client: int, examples: int, active: tuple[int, int], **tensors: list[float]) -> Update:
    adapter = {name: torch.tensor(values, dtype=torch.float64) for name, values in tensors.items()}
    return Update(client, adapter, examples, active, {"loss": 1.0})


OLD = {name: torch.tensor(values, dtype=torch.float64) for name, values in
       {"a": [1.0, 1.0], "b": [5.0, 5.0], "head": [0.0, 0.0]}.items()}  # fmt: skip


def test_weighted_by_examples_by_hand() -> None:
    """n = 30, 10: (30 [2, 4] + 10 [6, 0]) / 40 = [3, 3]; b was not sent by client 1: (30 [1, 2] + 10 [5, 5]) / 40."""
    updates = [
        update(0, 30, (2, 2), a=[2.0, 4.0], b=[1.0, 2.0], head=[4.0, 0.0]),
        update(1, 10, (2, 0), a=[6.0, 0.0], head=[0.0, 4.0]),
    ]
    averaged = weighted_average(OLD, updates, "examples", GROUP_OF)
    assert averaged["a"].tolist() == [3.0, 3.0]
    assert averaged["b"].tolist() == [2.0, 2.75]
    assert averaged["head"].tolist() == [3.0, 1.0]


def test_weighted_by_activity_by_hand() -> None:
    """a: weights 30*1 and 10*9, so (30 [2, 4] + 90 [6, 0]) / 120 = [5, 1]; b: client 0 alone; head by examples."""
    updates = [
        update(0, 30, (1, 2), a=[2.0, 4.0], b=[1.0, 2.0], head=[4.0, 0.0]),
        update(1, 10, (9, 0), a=[6.0, 0.0], head=[0.0, 4.0]),
    ]
    averaged = weighted_average(OLD, updates, "activity", GROUP_OF)
    assert averaged["a"].tolist() == [5.0, 1.0]
    assert averaged["b"].tolist() == [1.0, 2.0]
    assert averaged["head"].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("weighting", ["examples", "activity"])
def test_a_layer_that_no_client_trained_keeps_its_value(weighting: str) -> None:
    updates = [update(client, 10, (1, 0), a=[2.0, 2.0], head=[1.0, 1.0]) for client in (0, 1)]
    assert weighted_average(OLD, updates, weighting, GROUP_OF)["b"].tolist() == [5.0, 5.0]
    weights = tensor_weights("b", updates, weighting, GROUP_OF)
    assert weights.tolist() == ([0.5, 0.5] if weighting == "examples" else [0.0, 0.0])


def random_updates(number: int) -> tuple[dict[str, torch.Tensor], list[Update]]:
    rng = torch.Generator().manual_seed(0)
    old = {name: torch.randn(4, 3, generator=rng) for name in ("a", "b", "head")}
    updates = [
        Update(k, {n: torch.randn(4, 3, generator=rng) for n in old}, 3 + 7 * k, (k + 1, 2), {"loss": 1.0})
        for k in range(number)
    ]
    return old, updates


@pytest.mark.parametrize("weighting", ["examples", "activity"])
def test_client_order_is_irrelevant_bitwise(weighting: str) -> None:
    old, updates = random_updates(4)
    expected = weighted_average(old, updates, weighting, GROUP_OF)
    for order in itertools.permutations(updates):
        averaged = weighted_average(old, order, weighting, GROUP_OF)
        assert all(torch.equal(averaged[name], expected[name]) for name in old)


def test_fedavg_uses_the_weighting_of_the_settings() -> None:
    old, updates = random_updates(3)
    settings = AggregationConfig(weighting="activity")
    round_ = Round(old, updates, GROUP_OF, 1.0, settings, {}, dict, lambda adapters: [])
    outcome, expected = fedavg(round_), weighted_average(old, updates, "activity", GROUP_OF)
    assert all(torch.equal(outcome.adapter[name], expected[name]) for name in old)
    assert not outcome.residual and not outcome.notes


@pytest.mark.parametrize("rule", LINEAR)
@pytest.mark.parametrize("weighting", ["examples", "activity"])
@pytest.mark.parametrize("seed", range(5))
def test_pooled_updates_have_the_effect_of_individual_updates(rule: str, weighting: str, seed: int) -> None:
    """9 clients on 3 nodes at random; layer b is always off at some clients, and at all of them for seed 0."""
    rng = torch.Generator().manual_seed(seed)
    old, updates = random_updates(9)
    nodes = torch.randint(3, (9,), generator=rng).tolist()
    active = [(k + 1, 0 if nodes[k] == 0 or seed == 0 else k % 3) for k in range(9)]
    updates = [
        replace(u, active_steps=steps, adapter=trained(u.adapter, steps, GROUP_OF))
        for u, steps in zip(updates, active, strict=True)
    ]
    pooled = [
        pool(old, [u for u, at in zip(updates, nodes, strict=True) if at == node], weighting, GROUP_OF)
        for node in set(nodes)
    ]
    assert sum(update.num_examples for update in pooled) == sum(update.num_examples for update in updates)
    assert all(("b" in update.adapter) == (update.active_steps[1] > 0) for update in pooled)
    settings = AggregationConfig(rule=rule, weighting=weighting)
    averaged, expected = (
        find_rule(rule).aggregate(Round(old, sent, GROUP_OF, 1.0, settings, {}, dict, lambda adapters: [])).adapter
        for sent in (pooled, updates)
    )
    for name in old:
        assert torch.allclose(averaged[name], expected[name], rtol=1e-6, atol=1e-6), name


def test_a_pooled_update_by_hand() -> None:
    """n = 30, 10 and a = 1, 9: N = 40, a = (30 + 90) / 40 = 3, loss (30 * 2 + 10 * 4) / 40; a by activity."""
    updates = [
        update(8, 30, (1, 0), a=[2.0, 4.0], head=[4.0, 0.0]),
        update(3, 10, (9, 0), a=[6.0, 0.0], head=[0.0, 4.0]),
    ]
    updates = [replace(u, metrics={"loss": loss}) for u, loss in zip(updates, (2.0, 4.0), strict=True)]
    pooled = pool(OLD, updates, "activity", GROUP_OF)
    assert (pooled.client, pooled.num_examples, pooled.active_steps) == (3, 40, (3.0, 0.0))
    assert pooled.metrics == {"loss": 2.5}
    assert {name: tensor.tolist() for name, tensor in pooled.adapter.items()} == {"a": [5.0, 1.0], "head": [3.0, 1.0]}


def test_nodes_pool_for_linear_rules_at_full_precision() -> None:
    pooled = Config().changed(updates="pooled")
    assert pools(pooled)
    assert not pools(Config())
    assert not pools(pooled.changed(uplink_dtype="int8"))
    assert not pools(pooled.changed(rule="median"))
    assert not pools(pooled.changed(control_variates=True))


def test_averaging_sums_wider_than_float32() -> None:
    """1e8 + 1 - 1e8 loses the 1 in float32."""
    old = {"a": torch.zeros(1)}
    updates = [Update(k, {"a": torch.tensor([v])}, 1, (1,), {}) for k, v in enumerate((1e8, 3.0, -1e8))]
    assert weighted_average(old, updates, "examples", {"a": 0})["a"].item() == pytest.approx(1.0)


def test_the_norm_does_not_depend_on_the_order_of_the_tensors() -> None:
    """A square of 1 is lost in a sum with 1e16, two together are not."""
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0]), "c": torch.tensor([1e8]), "d": torch.tensor([2e8])}
    assert len({norm(dict(order)) for order in itertools.permutations(tensors.items())}) == 1


def test_complete_difference_norm() -> None:
    sent = update(0, 1, (1, 0), a=[4.0, 5.0])
    whole = complete(sent, OLD)
    assert whole["a"].tolist() == [4.0, 5.0] and whole["b"].tolist() == [5.0, 5.0]
    assert norm(difference(whole, OLD)) == pytest.approx(5.0)  # (3, 4) in a, 0 elsewhere


def test_checkpoint_round_trip_is_bitwise(tmp_path) -> None:
    adapter = random_updates(1)[0]
    write_tensors(tmp_path / "x.safetensors", adapter, {"row": "{}"})
    again, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"row": "{}"}
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
