"""State between rounds: of the server in checkpoints, of clients on their nodes, of the server in nodes' caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients.client_state import ClientState, ClientStateStore, StateGone
from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, join_names
from copra_fl.aggregation import pools
from copra_fl.config import Config
from copra_fl.files import cache_dir
from copra_fl.records import Origin, Provenance, RoundRecord
from copra_fl.training.plan import Plan, leaves_state
from server.journal import Journal
from server.run_context import RunContext
from server.state_sync import StateSync
from tests.support.federations import assert_equal

ROUND = RoundRecord(round=1, seconds=1, bytes_down=2, bytes_up=3, train_loss=None, layers=(), clients=(), missing=())
ORIGIN = Origin(
    after_round=0, versions={}, source_digest="5f", machine={}, engine="stacked", data_digest="0a", assets={}
)


def make_adapter(value: float) -> Adapter:
    return {"x.lora_A.weight": torch.full((2, 3), value), "head.bias": torch.full((4,), value)}


def test_a_server_state_survives_its_checkpoint(tmp_path: Path) -> None:
    residual = {"x.residual_B": torch.ones(4, 1), "x.residual_A": torch.ones(1, 3)}
    adapter, *kinds = (make_adapter(value) for value in range(5))
    earlier = tuple(make_adapter(value) for value in range(5, 17))
    state = ServerState(
        adapter, residual, *kinds[:3], optimizer={"exp_avg": kinds[3]}, earlier=earlier, last_rounds={7: 3, 0: 12}
    )
    journal = Journal(tmp_path)
    assert journal.resume() is None
    journal.record(ROUND, state)
    resumed = Journal(tmp_path)
    loaded = resumed.resume()
    assert loaded is not None and resumed.records == [ROUND]
    assert loaded.last_rounds == state.last_rounds
    before, after = (
        join_names(vars(kept) | {"earlier": dict(enumerate(kept.earlier)), "last_rounds": {}})
        for kept in (state, loaded)
    )
    assert_equal(after, before)


def test_a_run_keeps_its_id_over_reads_and_resumes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    run = journal.run
    assert journal.run == run != Journal(tmp_path).run, "a run without provenance has no id on disk yet"
    journal.add_origin(3, ORIGIN)
    resumed = Journal(tmp_path)
    assert resumed.run == run
    resumed.add_origin(3, ORIGIN.model_copy(update={"after_round": 2}))
    provenance = Provenance.from_json((tmp_path / "provenance.json").read_text())
    assert (provenance.run, provenance.seed, provenance.start) == (run, 3, ORIGIN)
    assert [origin.after_round for origin in provenance.resumes] == [2]


def bias(state: ClientState) -> list[float]:
    return state.personal["head.bias"].tolist()


def test_a_client_goes_on_from_its_state_after_the_round_that_the_server_names() -> None:
    store = ClientStateStore("run")
    assert store.read(3, 0) == ClientState()
    for server_round, last_round in ((1, 0), (2, 1), (5, 2)):
        errors = {"head.bias": torch.ones(4)}
        state = ClientState(personal=make_adapter(server_round), quantization_error=errors)
        store.write(3, server_round, state, last_round)
    assert bias(store.read(3, 5)) == [5] * 4 and store.read(3, 5).control == {}
    assert bias(store.read(3, 2)) == [2] * 4, "the server has not used the update of round 5"
    store.write(3, 6, ClientState(personal=make_adapter(7)), 2)
    assert bias(store.read(3, 6)) == [7] * 4
    for gone in (1, 5):
        with pytest.raises(StateGone, match=f"state of client 3 after round {gone} is gone: the cache folder"):
            store.read(3, gone)
    assert store.read(3, 0) == ClientState() == ClientStateStore("other").read(3, 0), "the run starts anew"
    (file, *_) = (cache_dir() / "clients" / "run" / "client-3").iterdir()
    assert file.stat().st_mode & 0o077 == 0, "other users cannot read it"


def test_a_state_survives_any_number_of_rounds_that_do_not_use_the_update() -> None:
    """Without one more file a round; and the late training of round 4 does not remove the state after round 5."""
    store = ClientStateStore("unused")
    store.write(3, 1, ClientState(personal=make_adapter(1)), 0)
    for server_round in (2, 3, 5, 4):
        store.write(3, server_round, ClientState(personal=make_adapter(server_round)), 1)
    assert [bias(store.read(3, last_round))[0] for last_round in (1, 4, 5)] == [1, 4, 5]
    for gone in (2, 3):
        with pytest.raises(StateGone):
            store.read(3, gone)


def state_sync(flat: dict[str, object]) -> StateSync:
    config = Config.from_flat({"rank": 2, "num-clients": 2} | flat)
    return StateSync(RunContext("run", Path(), config, {}, 0, score=lambda adapters, residual: []))


def delta_to_node(sync: StateSync, server_round: int, number: int, client: int = 0) -> wire.StateDelta:
    """Pack a message for node 100, before (number = round - 1) or after (number = round) a round; return its delta."""
    plan, state = Plan(server_round, (client,), Config()), ServerState(make_adapter(1))
    return wire.unpack_delta(sync.pack(plan, state, {}, number, node=100))


HEAD, EVERYTHING = (0,), (0, 1)


def test_a_node_gets_what_has_changed_since_its_cached_state() -> None:
    """With ffa-lora A never changes."""
    sync = state_sync({"rule": "ffa-lora"})
    first = delta_to_node(sync, 1, 0)
    assert (first.since, first.tensors) == (-1, EVERYTHING)
    sync.advance(ServerState(make_adapter(1) | {"head.bias": torch.zeros(4)}), ServerState(make_adapter(1)), {})
    assert delta_to_node(sync, 2, 1).since == -1, "the node has not answered"
    sync.acknowledge(100)
    next_round = delta_to_node(sync, 3, 2)
    assert (next_round.since, next_round.tensors) == (1, HEAD)
    sync.acknowledge(100)
    evaluation = delta_to_node(sync, 2, 2)
    assert (evaluation.since, evaluation.tensors) == (2, ())
    later = delta_to_node(sync, 6, 5)
    assert (later.since, later.tensors) == (-1, EVERYTHING), "the node was not in the rounds between"
    sync.forget(100)
    assert delta_to_node(sync, 3, 2).since == -1


def test_a_node_whose_cached_tensors_are_cut_to_a_smaller_rank_gets_everything() -> None:
    """Client 0 has rank 1, client 1 rank 2. In a round of client 0 the node caches A cut to rank 1."""
    sync = state_sync({"rule": "zero-pad", "client-ranks": "1,2", "layers-per-round": 1})
    sync.advance(ServerState(make_adapter(1) | {"head.bias": torch.zeros(4)}), ServerState(make_adapter(1)), {})
    delta_to_node(sync, 1, 0, client=0)
    sync.acknowledge(100)
    assert delta_to_node(sync, 2, 1, client=0).tensors == HEAD
    larger = delta_to_node(sync, 2, 1, client=1)
    assert (larger.since, larger.tensors, larger.rank) == (-1, EVERYTHING, 2)
    sync.acknowledge(100)
    smaller = delta_to_node(sync, 3, 2, client=0)
    assert (smaller.since, smaller.tensors, smaller.rank) == (1, HEAD, 1)
    sync.advance(ServerState(make_adapter(0)), ServerState(make_adapter(1)), {})
    assert delta_to_node(sync, 3, 2, client=1).since == 1, "all tensors have changed"


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({}, False),
        ({"rule": "flora"}, False),
        ({"rule": "fedsa-lora"}, True),
        ({"control-variates": True}, True),
        ({"uplink-dtype": "int8"}, True),
        ({"uplink-dtype": "float16"}, False),
    ],
)
def test_which_settings_leave_state_with_the_clients(flat: dict[str, object], expected: bool) -> None:
    assert leaves_state(Config.from_flat(flat)) == expected


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({}, True),
        ({"rule": "ffa-lora"}, True),
        ({"rule": "fedsvd"}, True),
        ({"rule": "median"}, False),
        ({"updates": "individual"}, False),
        ({"uplink-dtype": "float16"}, False),
        ({"control-variates": True}, False),
        ({"client-ranks": "1,2", "rank-assignment": "drawn", "rule": "zero-pad"}, False),
        ({"start": "own"}, False),
        ({"stale-clients": 0.1}, False),
    ],
)
def test_which_settings_let_nodes_pool(flat: dict[str, object], expected: bool) -> None:
    assert pools(Config.from_flat({"updates": "pooled", **flat})) == expected
