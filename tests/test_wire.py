"""Plans, updates and handshakes as Flower records, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import RecordDict

from copra_fl import wire
from copra_fl.config import Config
from copra_fl.training.plan import Plan
from tests.support.updates import GLOBAL, VALID


def test_a_plan_and_the_servers_state_survive_packing() -> None:
    config = Config.from_flat({"alpha": 0.5, "num-clients": 9, "seed": 3})
    plan = Plan(2, (1, 5), config, inspected=(5,), last_rounds={5: 1})
    delta = wire.StateDelta("run", number=1, since=-1, tensors=(0, 1, 2), rank=2)
    content = wire.pack_plan(plan, delta, wire.Payload(GLOBAL, {}, {}, {}))
    assert wire.unpack_plan(content) == plan and wire.unpack_delta(content) == delta
    adapter = wire.unpack_payload(content, delta, dict(reversed(GLOBAL.items())), {}).adapter
    assert adapter.keys() == GLOBAL.keys() and all(torch.equal(adapter[name], GLOBAL[name]) for name in GLOBAL)


def test_a_state_of_another_size_is_rejected() -> None:
    delta = wire.StateDelta("run", number=1, since=-1, tensors=(0, 1, 2), rank=2)
    content = wire.pack_plan(Plan(2, (1,), Config()), delta, wire.Payload(GLOBAL, {}, {}, {}))
    with pytest.raises(ValueError, match="values should be 4 values of torch.float32 in a row"):
        wire.unpack_payload(content, delta, {"head.weight": torch.zeros(4)}, {})


def test_updates_and_failures_survive_packing() -> None:
    content = wire.pack_updates([VALID], {"adapters": {"values": torch.arange(3)}}, {4: "Traceback"})
    assert wire.unpack_scalars(content, 7) == replace(VALID, adapter={})
    assert wire.unpack_arrays(content, "adapters")["values"].tolist() == [0, 1, 2]
    assert wire.unpack_failures(content) == {4: "Traceback"}


@pytest.mark.parametrize(
    "handshake",
    [
        wire.Handshake(1, "digest", 5, {1: 10, 4: 0}, {1: 2, 4: 0}, ["a", "b"]),
        wire.Handshake(1, "digest", rejection_reason="it has no data"),
    ],
)
def test_a_handshake_survives_packing(handshake: wire.Handshake) -> None:
    assert wire.unpack_handshake(wire.pack_handshake(handshake)) == handshake


def test_a_cached_state_belongs_to_its_run() -> None:
    node_state = RecordDict()
    assert wire.read_cached_state(node_state, "run") is None
    wire.write_cached_state(node_state, "run", wire.CachedState(3, GLOBAL, {}))
    cached = wire.read_cached_state(node_state, "run")
    assert cached is not None and cached.number == 3 and cached.adapter.keys() == GLOBAL.keys()
    assert wire.read_cached_state(node_state, "other") is None


def test_bytes_are_those_of_arrays_and_metrics() -> None:
    """4 bytes per number and at most 200 of header; 8 for each of 7 metrics, and their names."""
    scalars = wire.pack_updates([VALID], {}, {})
    with_tensors = wire.pack_updates([VALID], {"adapters": {"values": torch.zeros(1000)}}, {})
    assert 7 * 8 < wire.num_bytes(scalars) < 7 * 8 + 100
    assert 4000 < wire.num_bytes(with_tensors) - wire.num_bytes(scalars) < 4200
