"""What server and nodes keep: there and back, and what a resumed round may see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients.client_state import ClientState, Memory
from copra_fl.adapters.server_state import State
from copra_fl.adapters.state import Adapter
from copra_fl.aggregation import pools
from copra_fl.config import Config
from copra_fl.training.plan import leaves_state
from server.journal import Journal


def tensors(value: float) -> Adapter:
    return {"x.lora_A.weight": torch.full((2, 3), value), "head.bias": torch.full((4,), value)}


def test_a_state_survives_its_checkpoint(tmp_path: Path) -> None:
    residual = {"x.residual_B": torch.ones(4, 1), "x.residual_A": torch.ones(1, 3)}
    state = State(tensors(1), residual, tensors(2), tensors(3), tensors(4))
    journal = Journal(tmp_path)
    assert journal.resume() is None
    journal.record({"round": 1}, state)
    back = Journal(tmp_path).resume()
    assert back is not None
    for kind, expected in vars(state).items():
        found = getattr(back, kind)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected), kind


def test_a_client_remembers_its_last_round_before_the_one_that_runs() -> None:
    memory = Memory("run")
    assert memory.read(3, before=1) == ClientState()
    for server_round in (1, 2, 5):
        memory.write(3, server_round, ClientState(personal=tensors(server_round), lost={"head.bias": torch.ones(4)}))
    found = memory.read(3, before=6)
    assert found.personal["head.bias"].tolist() == [5] * 4 and found.control == {}
    assert memory.read(3, before=5).personal["head.bias"].tolist() == [2] * 4, "round 5 is run again"
    memory.write(3, 5, ClientState(personal=tensors(7)))
    assert memory.read(3, before=6).personal["head.bias"].tolist() == [7] * 4
    assert memory.read(3, before=2) == ClientState(), "only the two newest are kept"
    assert memory.read(33, before=6) == ClientState() == Memory("other").read(3, before=6)
    memory.write(4, 1, ClientState())
    assert memory.read(4, before=2) == ClientState(), "it trained nothing"


@pytest.mark.parametrize(
    ("flat", "wanted"),
    [
        ({}, False),
        ({"rule": "flora"}, False),
        ({"rule": "fedsa-lora"}, True),
        ({"control-variates": True}, True),
        ({"uplink-dtype": "int8"}, True),
        ({"uplink-dtype": "float16"}, False),
    ],
)
def test_who_leaves_something_with_its_clients(flat: dict, wanted: bool) -> None:
    assert leaves_state(Config.from_flat(flat)) == wanted


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({}, True),
        ({"rule": "ffa-lora"}, True),
        ({"rule": "median"}, False),
        ({"updates": "individual"}, False),
        ({"uplink-dtype": "float16"}, False),
        ({"control-variates": True}, False),
        ({"client-ranks": "1,2", "rank-assignment": "drawn", "rule": "zero-pad"}, False),
    ],
)
def test_where_nodes_may_pool(flat: dict, expected: bool) -> None:
    assert pools(Config.from_flat({"updates": "pooled", **flat})) == expected
