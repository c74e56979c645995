"""Own starts, stale clients, anchors: against rounds that are trained with plain PEFT and averaged by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from copra_fl.adapters.state import Adapter, difference, norm, part_of
from copra_fl.aggregation import starts
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.models.build import build_model, load_processor
from copra_fl.probes.open_run import open_run
from copra_fl.seeding import derive
from copra_fl.training.plan import Plan, Start
from copra_fl.training.single import train_client
from tests.support.federations import final_adapter, finished_run, journal
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings

#: half of the layers are off for a round of a client, which then sends its update without them
LATE: Settings = {
    "start": "own", "stale-clients": 0.5, "staleness": 2, "num-rounds": 4, "mask-scope": "round", "p0": 0.5, "p1": 0.5,
}  # fmt: skip

ANCHORS: Settings = {"gucci-beta": 0.5, "gucci-anchors": 3, "num-rounds": 4, "local-training": "lora"}


def own_start(initial: Adapter, client: int) -> Adapter:
    """Return `initial` with the client's own A: uniform in +-1 / sqrt(columns), as PEFT draws it."""
    stream = torch.Generator().manual_seed(derive(0, "start", client))
    adapter = dict(initial)
    for name in sorted(initial):
        if part_of(name) == "A":
            size = initial[name].shape[1] ** -0.5
            adapter[name] = torch.empty(initial[name].shape).uniform_(-size, size, generator=stream)
        elif part_of(name) == "B":
            torch.empty(initial[name].shape).uniform_(0, 0, generator=stream)
    return adapter


def averaged(adapters: Mapping[int, Adapter], data: FederatedData) -> Adapter:
    """Return the average by numbers of examples, in float64."""
    examples = [len(data.train[client]) for client in adapters]
    return {
        name: sum(
            n / sum(examples) * adapter[name].double() for n, adapter in zip(examples, adapters.values(), strict=True)
        ).float()
        for name in next(iter(adapters.values()))
    }


@pytest.fixture(scope="module")
def run(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny | LATE | {"engine": "peft"}, tmp_path_factory.mktemp("runs") / "late")


def test_a_federation_equals_its_rounds_by_hand(tiny: Settings, run: Path) -> None:
    """Clients of age 2 start from states 0, 0, 0 and 1; who starts from state 0 has its own A."""
    config = Config.from_flat(tiny | LATE)
    data = load_data(config, load_processor(config.model))
    model = build_model(config.model, "layer", 3, seed=0)
    stale = starts.stale_clients(config)
    assert len(stale) == 3
    states = [model.read_adapter()]
    for server_round in range(1, 5):
        plan, trained = Plan(server_round, tuple(range(6)), config), {}
        for client in range(6):
            origin = max(server_round - 1 - (2 if client in stale else 0), 0)
            start = own_start(states[0], client) if origin == 0 else states[origin]
            trained[client] = start | train_client(model, data, plan, client, Start(start)).adapter
        states.append(averaged(trained, data))
    final = {name: tensor for name, tensor in final_adapter(run).items() if "/" not in name}
    assert norm(difference(final, states[4])) < 1e-5 * norm(states[4])
    assert any(0 in row["active_steps"] for record in journal(run) for row in record["clients"])
    ages = [{row["client"]: row["staleness"] for row in record["clients"]} for record in journal(run)]
    assert ages == [{client: age if client in stale else 0 for client in range(6)} for age in (0, 1, 2, 2)]


def test_the_engines_agree_and_the_older_adapter_is_counted(tiny: Settings, run: Path, tmp_path: Path) -> None:
    stacked = run_federation(tiny | LATE, tmp_path / "stacked")
    assert norm(difference(final_adapter(stacked), final_adapter(run))) < 1e-4 * norm(final_adapter(run))
    down = [row["bytes_down"] for row in journal(stacked)]
    one_adapter = 4 * sum(tensor.numel() for name, tensor in final_adapter(stacked).items() if "/" not in name)
    assert down[0] == pytest.approx(2 * one_adapter, rel=0.1), "two nodes, and no older adapter yet"
    assert down[1:] == pytest.approx([4 * one_adapter] * 3, rel=0.1)


def test_probes_train_the_same_clients_again(run: Path) -> None:
    """Rounds 1 (own A), 3 (stale, own A) and 4 (stale): the average of the clients is the next global adapter."""
    opened = open_run(run)
    for server_round in (1, 3, 4):
        again = averaged(opened.clients(server_round), opened.data)
        expected = opened.state(server_round).adapter
        assert norm(difference(again, expected)) < 1e-5 * norm(expected), server_round


def test_a_federation_of_fedgucci_equals_its_rounds_by_hand(tiny: Settings, tmp_path: Path) -> None:
    """The anchors are the last three global adapters, or all before there are so many; nodes receive them."""
    run, config = finished_run(tiny | ANCHORS, tmp_path / "anchors"), Config.from_flat(tiny | ANCHORS)
    data = load_data(config, load_processor(config.model))
    model = build_model(config.model, "layer", 3, seed=0)
    states = [model.read_adapter()]
    for server_round in range(1, 5):
        plan, start = Plan(server_round, tuple(range(6)), config), Start(states[-1], anchors=tuple(states[-2:-4:-1]))
        updates = {client: train_client(model, data, plan, client, start) for client in range(6)}
        states.append(averaged({client: start.adapter | update.adapter for client, update in updates.items()}, data))
        assert {update.metrics["flops"] for update in updates.values()} == {
            row["flops"] for row in journal(run)[server_round - 1]["clients"]
        }
    final = {name: tensor for name, tensor in final_adapter(run).items() if "/" not in name}
    assert norm(difference(final, states[4])) < 1e-4 * norm(states[4])
    one_adapter = 4 * sum(tensor.numel() for tensor in final.values())
    down = [row["bytes_down"] / (2 * one_adapter) for row in journal(run)]
    assert down == pytest.approx([1, 2, 3, 3], rel=0.1), "adapters for each of two nodes"
    opened = open_run(run)
    again = averaged(opened.clients(4), opened.data)
    assert norm(difference(again, opened.state(4).adapter)) < 1e-5 * norm(again)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "ffa-lora", "server-optimizer": "fedavgm", "stale-clients": 0.5},
        {"local-training": "head", "server-optimizer": "fedadam", "gucci-beta": 0.5, "gucci-anchors": 2},
        {"rule": "ffa-lora", "dp-clip": 0.1, "weighting": "equal", "gucci-beta": 0.5, "gucci-anchors": 2},
    ],
)
def test_a_tensor_that_stays_still_is_in_a_checkpoint_under_both_names(
    tiny: Settings, changes: Settings, tmp_path: Path
) -> None:
    """Server optimizers and private averages return it as it was, and the older adapter has it too."""
    flat = tiny | {"num-rounds": 2, "merge-gap-clients": 0, "local-training": "lora"} | changes
    assert len(journal(run_federation(flat, tmp_path / "run"))) == 2


def test_stale_clients_are_drawn_once_and_at_least_one() -> None:
    config = Config.from_flat({"num-clients": 40, "stale-clients": 0.25})
    stale = starts.stale_clients(config)
    assert len(stale) == 10 and stale == starts.stale_clients(config) != starts.stale_clients(config.changed(seed=1))
    assert len(starts.stale_clients(config.changed(stale_clients=0.001))) == 1
    assert starts.stale_clients(config.changed(stale_clients=0.0)) == set()
