"""Moments between rounds: the engines agree, a client's moments equal one long training, shared ones are averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import OptimizerState, Update
from copra_fl.aggregation.checking import BadUpdate
from copra_fl.aggregation.shared_moments import average_moments, no_moments
from copra_fl.config import Config
from copra_fl.training.batches import plan_steps
from copra_fl.training.optimizer import make_optimizer, set_learning_rates
from copra_fl.training.plan import Plan
from server.replies import with_moments
from tests.support.federations import final_state, journal
from tests.support.local_grid import run_federation
from tests.support.rounds import update as make_update
from tests.support.tiny import Settings
from tests.support.worlds import World, assert_alike, relative_error

KEPT = {"optimizer-state": "client", "num-rounds": 4, "alpha": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"p0": 0.3},
        {"rule": "ffa-lora", "weight-decay": 0.1, "lr-schedule": "cosine"},
        {"optimizer": "sgd", "momentum": 0.9, "learning-rate": 0.1, "head-learning-rate": 0.1},
        {"local-epochs": 1, "alpha": 0.3},
    ],
    ids=["copra", "B and head", "sgd", "unequal steps"],
)
def test_both_engines_return_and_take_the_same_moments(tiny: Settings, changes: Settings) -> None:
    """Oracle: plain PEFT, one client after the other; in the second training from the moments of the first."""
    world = World(tiny | KEPT | changes, double=True)
    first = {update.client: update for update in world.together(*range(6))}
    for client, update in first.items():
        alone = world.alone(client)
        assert update.optimizer.keys() == alone.optimizer.keys()
        for kind, tensors in alone.optimizer.items():
            assert update.optimizer[kind].keys() == tensors.keys()
            assert relative_error(update.optimizer[kind], tensors) < 1e-10
    world.optimizers = {client: update.optimizer for client, update in first.items()}
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-10)
        assert relative_error(update.adapter, first[update.client].adapter) > 1e-4, "the moments have an effect"


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_torch_chooses_the_implementation_for_few_tensors(name: str) -> None:
    """None is torch's default, which is foreach on CUDA; False would be a loop over the tensors."""
    training = Config.from_flat({"optimizer": name}).training
    optimizer = make_optimizer(training, [torch.zeros(2)], [torch.zeros(2)])
    assert optimizer.defaults["foreach"] is optimizer.defaults["fused"] is None


def test_two_rounds_with_kept_moments_equal_one_plain_loop_with_one_optimizer(tiny: Settings) -> None:
    """Oracle: torch's AdamW over PEFT's parameters, made once for the batches and masks of both rounds."""
    flat = tiny | {"optimizer-state": "client", "num-rounds": 2, "local-steps": 6, "p0": 0.4, "max-grad-norm": 0.0}
    world = World(flat, server_round=1)
    for server_round in (1, 2):
        world.plan = Plan(server_round, (0,), world.config)
        (update,) = world.together(0)
        world.starts[0], world.optimizers[0] = world.starts[0] | update.adapter, update.optimizer

    model, training = world.plain, world.config.training
    model.write_adapter(world.start)
    parameters = model.train_only({"A", "B", "head"})
    heads = [parameter for name, parameter in parameters.items() if name.startswith("head")]
    adapters = [parameter for name, parameter in parameters.items() if not name.startswith("head")]
    optimizer = torch.optim.AdamW([{"params": adapters}, {"params": heads}], weight_decay=0.0)
    for server_round in (1, 2):
        steps = plan_steps(Plan(server_round, (0,), world.config), world.data, 0, len(model.gates.names))
        for mask, t, micro_batches in zip(steps.masks, steps.t, steps.batches, strict=True):
            set_learning_rates(optimizer, training, t)
            model.gates.set(mask)
            batch = world.data.examples.batch(micro_batches[0])
            F.cross_entropy(model(**batch), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert relative_error(world.starts[0], model.read_adapter()) < 1e-5


def test_shared_moments_are_averaged_over_the_clients_that_trained_the_layer(tiny: Settings) -> None:
    """By hand: layer 0 was trained by both clients, 2 and 6 steps; layer 1 by client 1 alone; 10 and 30 examples."""
    name, other, group_of = "m.0.lora_A.weight", "m.1.lora_A.weight", {"m.0.lora_A.weight": 0, "m.1.lora_A.weight": 1}
    adapter = {name: torch.zeros(1, 2), other: torch.zeros(1, 2), "head.bias": torch.zeros(1)}
    before = no_moments(Config().training, adapter)
    before["exp_avg"][other], before["step"][name] = torch.tensor([[5.0, 5.0]]), torch.tensor(4.0)

    def trained(client: int, examples: int, active: tuple[int, int], value: float) -> Update:
        names = [n for n in adapter if n not in group_of or active[group_of[n]]]
        moments = {n: torch.full_like(adapter[n], value) for n in names}
        state: OptimizerState = {"exp_avg": moments, "exp_avg_sq": {n: m**2 for n, m in moments.items()}}
        update = make_update(client, {n: adapter[n] for n in names}, examples, active)
        return replace(update, optimizer=state, metrics={"steps": 8.0})

    updates = [trained(0, 10, (2, 0), 1.0), trained(1, 30, (6, 8), 3.0)]
    state = average_moments(before, updates, "activity", group_of)
    weights = 20 / 200, 180 / 200
    assert state["exp_avg"][name].tolist() == [[pytest.approx(weights[0] * 1 + weights[1] * 3)] * 2]
    assert state["exp_avg_sq"][name].tolist() == [[pytest.approx(weights[0] * 1 + weights[1] * 9)] * 2]
    assert float(state["step"][name]) == pytest.approx(4 + weights[0] * 2 + weights[1] * 6)
    assert state["exp_avg"][other].tolist() == [[3.0, 3.0]] and float(state["step"][other]) == 8
    assert float(state["step"]["head.bias"]) == 8
    by_examples = average_moments(before, updates, "examples", group_of)
    assert by_examples["exp_avg"][other].tolist() == [[pytest.approx(0.25 * 5 + 0.75 * 3)] * 2]


def test_a_single_client_gets_its_own_moments_back_from_the_server(tiny: Settings, tmp_path: Path) -> None:
    """With one client the average of the moments is its own, so both settings give the same adapter."""
    flat = tiny | {"num-clients": 1, "alpha": 100.0, "num-rounds": 3, "p0": 0.5}
    runs = {
        kind: run_federation(flat | {"optimizer-state": kind}, tmp_path / kind, num_nodes=1)
        for kind in ("fresh", "client", "shared")
    }
    fresh, client, shared = (final_state(directory).adapter for directory in runs.values())
    assert relative_error(shared, client) < 1e-6
    assert relative_error(fresh, client) > 1e-3
    up, down = (
        {kind: sum(line[f"bytes_{way}"] for line in journal(runs[kind])) for kind in runs} for way in ("up", "down")
    )
    assert up["client"] == up["fresh"] and down["client"] == down["fresh"]
    assert up["shared"] == pytest.approx(3 * up["fresh"], rel=0.05)
    assert down["shared"] == pytest.approx(3 * down["fresh"], rel=0.05)

    rounded = run_federation(flat | {"optimizer-state": "shared", "moments-dtype": "bfloat16"}, tmp_path / "16", 1)
    assert 0 < relative_error(final_state(rounded).adapter, shared) < 1e-3
    for way in ("up", "down"):
        num_bytes = sum(line[f"bytes_{way}"] for line in journal(rounded))
        assert num_bytes == pytest.approx(2 * (up if way == "up" else down)["fresh"], rel=0.05)


def test_shared_moments_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    adapter = {"m.0.lora_A.weight": torch.ones(1, 2)}
    state = ServerState(
        adapter, control_sum={"m.0.lora_A.weight": torch.zeros(1, 2)}, optimizer=no_moments(Config().training, adapter)
    )
    state.save(tmp_path / "state.safetensors", {})
    loaded, _ = ServerState.load(tmp_path / "state.safetensors")
    assert loaded.adapter.keys() == adapter.keys() and loaded.control_sum.keys() == adapter.keys()
    assert {kind: list(tensors) for kind, tensors in loaded.optimizer.items()} == {
        kind: list(adapter) for kind in ("exp_avg", "exp_avg_sq", "step")
    }


def test_a_negative_second_moment_is_rejected() -> None:
    update = make_update(3, {"head.bias": torch.ones(2)}, 5)
    moments = {"exp_avg_sq": [replace(update, adapter={"head.bias": torch.tensor([1.0, -1.0])})]}
    with pytest.raises(BadUpdate, match="client 3: the second moment of head.bias has negative values"):
        with_moments(update, moments, 0)


def test_a_message_carries_the_shared_moments() -> None:
    adapter = {"head.bias": torch.ones(2)}
    state = no_moments(Config().training, adapter)
    state["step"]["head.bias"] = torch.tensor(7.5)
    delta = wire.StateDelta("run", 1, -1, ("head",), 8)
    content = wire.pack_plan(Plan(2, (0,), Config()), delta, wire.Payload(adapter, {}, {}, state))
    payload = wire.unpack_payload(content, delta, adapter, no_moments(Config().training, adapter))
    assert float(payload.optimizer["step"]["head.bias"]) == 7.5
    assert payload.optimizer["exp_avg"]["head.bias"].tolist() == [0, 0]
