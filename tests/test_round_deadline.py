"""End of a round: with enough replies, at its deadline, or with an error after which the run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from copra_fl.config import Config, ConfigError
from copra_fl.deployment import registration
from copra_fl.provenance import library_digest
from copra_fl.wire import Handshake, pack_handshake
from server.errors import FederationError
from server.handshake import CLIENTS
from tests.support.federations import assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings


class SilentGrid(LocalGrid):
    """Nodes that do not reply to training in some rounds: `silent` is node -> rounds."""

    def __init__(self, silent: dict[int, set[int]], num_nodes: int = 3) -> None:
        super().__init__(num_nodes)
        self.silent = silent

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            (message_id,) = super().push_messages([message])
            metadata = message.metadata
            silent_rounds = self.silent.get(metadata.dst_node_id, ())
            if metadata.message_type == "train" and message.content["plan"]["server-round"] in silent_rounds:
                del self.replies[message_id]
            yield message_id


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    flat = {"num-clients": 3, "num-rounds": 3, "failures": "tolerant", "merge-gap-clients": 0, "path-pairs": 0}
    return tiny | flat | {"round-timeout-s": 5.0}


def clients(directory: Path) -> list[list[int]]:
    """Return the clients of each round that sent a valid update."""
    return [[client["client"] for client in row["clients"]] for row in journal(directory)]


def test_a_round_ends_at_its_deadline_and_names_the_silent_client(settings: Settings, tmp_path: Path) -> None:
    """Client 1 is silent in round 2, and replies again in round 3."""
    directory = run_federation(settings, tmp_path / "run", grid=SilentGrid({101: {2}}))
    assert clients(directory) == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert [row["missing"] for row in journal(directory)] == [
        [],
        [{"client": 1, "reason": "no reply within round-timeout-s = 5 s"}],
        [],
    ]
    assert journal(directory)[1]["seconds"] >= 5


def test_a_round_with_too_few_replies_stops_the_run_which_can_be_resumed(settings: Settings, tmp_path: Path) -> None:
    """The resumed run is bitwise equal to one that never stopped."""
    flat = settings | {"min-replies": 2, "round-timeout-s": 2.0}
    with pytest.raises(FederationError, match="^round 2: 1 valid replies, min-replies = 2; missing clients: 0: no"):
        run_federation(flat, tmp_path / "run", grid=SilentGrid({100: {2}, 101: {2}}))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-00001.safetensors"]
    resumed = run_federation(flat, tmp_path / "run", grid=LocalGrid(3))
    whole = run_federation(flat, tmp_path / "whole", grid=LocalGrid(3))
    assert clients(resumed) == [[0, 1, 2]] * 3
    assert_equal(final_adapter(resumed), final_adapter(whole))


def test_over_sampling_ends_the_round_with_the_first_replies(settings: Settings, tmp_path: Path) -> None:
    """2 of 3 clients are wanted and 3 are asked. In round 1 client 0 never replies, in round 2 client 2."""
    flat = settings | {"clients-per-round": 2, "over-sample": 0.5, "round-timeout-s": 600.0, "num-rounds": 2}
    directory = run_federation(flat, tmp_path / "run", grid=SilentGrid({100: {1}, 102: {2}}))
    assert clients(directory) == [[1, 2], [0, 1]]
    reason = "not among the first 2 clients"
    assert [row["missing"] for row in journal(directory)] == [
        [{"client": 0, "reason": reason}],
        [{"client": 2, "reason": reason}],
    ]


class LateGrid(LocalGrid):
    """Nodes connect one after another, one with each call of `get_node_ids`."""

    num_calls = 0

    def get_node_ids(self) -> Iterable[int]:
        self.num_calls += 1
        return list(self.contexts)[: self.num_calls]


def test_a_run_waits_for_its_nodes(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0, "num-rounds": 1, "failures": "strict"}
    assert clients(run_federation(flat | {"min-nodes": 3}, tmp_path / "run", grid=LateGrid(3))) == [[0, 1, 2]]
    with pytest.raises(FederationError, match="3 nodes connected within node-timeout-s = 2 s; min-nodes = 4"):
        run_federation(flat | {"min-nodes": 4, "node-timeout-s": 2.0}, tmp_path / "few", grid=LateGrid(3))


def rejecting(partition: int) -> ClientApp:
    """Return a node that takes part in no run."""
    app = ClientApp()

    @app.query()
    def handshake(message: Message, context: Context) -> Message:
        rejection = Handshake(partition, digest=library_digest(CLIENTS), rejection_reason="it has no data")
        return Message(pack_handshake(rejection), reply_to=message)

    return app


class RejectingGrid(LocalGrid):
    """Three nodes, of which the first two reject every run."""

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        return super().answer(message) if node == 102 else rejecting(node - 100)(message, self.contexts[node])


def test_nodes_that_reject_a_run_do_not_outvote_the_one_that_takes_part(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0, "min-nodes": 1, "min-replies": 1}
    assert clients(run_federation(flat, tmp_path / "run", grid=RejectingGrid(3))) == [[2]] * 3
    with pytest.raises(FederationError, match=r"node 100 \(partition-id 0\) .*it has no data"):
        run_federation(flat | {"failures": "strict"}, tmp_path / "strict", grid=RejectingGrid(3))


class JoiningGrid(LocalGrid):
    """Node 102 connects after the first round's training, and runs `late_app` if given."""

    def __init__(self, late_app: ClientApp | None = None) -> None:
        super().__init__(3)
        self.late_app, self.has_begun = late_app, False

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts) if self.has_begun else [100, 101]

    def answer(self, message: Message) -> Message:
        self.has_begun |= message.metadata.message_type == "train"
        if self.late_app and message.metadata.dst_node_id == 102:
            return self.late_app(message, self.contexts[102])
        return super().answer(message)


def test_a_late_node_trains_from_the_next_round_on(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0}
    assert clients(run_federation(flat, tmp_path / "run", grid=JoiningGrid())) == [[0, 1], [0, 1, 2], [0, 1, 2]]


def test_a_late_node_that_rejects_the_run_is_left_out(settings: Settings, tmp_path: Path) -> None:
    directory = run_federation(settings | {"num-clients": 0}, tmp_path / "run", grid=JoiningGrid(rejecting(2)))
    assert clients(directory) == [[0, 1]] * 3


class SilentlyJoiningGrid(JoiningGrid):
    """Node 102 does not answer the handshake."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            (message_id,) = super().push_messages([message])
            if message.metadata.dst_node_id == 102:
                del self.replies[message_id]
            yield message_id


def test_a_silent_late_node_is_named_and_costs_the_time_for_nodes_and_not_that_of_a_round(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = settings | {"num-clients": 0, "num-rounds": 2, "node-timeout-s": 0.5}
    with caplog.at_level("WARNING", logger="flwr"):
        directory = run_federation(flat, tmp_path / "run", grid=SilentlyJoiningGrid())
    assert clients(directory) == [[0, 1]] * 2
    reason = "nodes [102] did not answer the handshake within node-timeout-s = 0.5 s"
    assert f"a node is left out: {reason}" in caplog.text


class ImposterGrid(LocalGrid):
    """Until client 2's node (102) connects after the first round, node 103 says that it is client 2."""

    has_begun = False

    def __init__(self) -> None:
        super().__init__(4, node_configs=[{"num-partitions": 3}] * 4)
        self.contexts[103].node_config["partition-id"] = 2

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts) if self.has_begun else [100, 101, 103]

    def answer(self, message: Message) -> Message:
        self.has_begun |= message.metadata.message_type == "train"
        return super().answer(message)


def register(names: dict[int, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the keys' names of nodes as the SuperLink does for its server apps."""
    nodes = {name: {"id": str(node), "key": ""} for node, name in names.items()}
    (folder / registration.KNOWN).write_text(json.dumps(nodes))
    monkeypatch.setenv(registration.VARIABLE, str(folder))


def test_a_node_that_claims_another_keys_client_is_left_out_and_the_owner_is_not(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {100: "client-0", 101: "client-1", 102: "client-2", 103: "client-3"}
    flat = settings | {"num-clients": 0, "num-rounds": 2}
    unbound = run_federation(flat | {"num-rounds": 1}, tmp_path / "unbound", grid=ImposterGrid())
    assert clients(unbound) == [[0, 1, 2]], "without keys, any node can be any client"
    register(names, tmp_path, monkeypatch)
    assert clients(run_federation(flat, tmp_path / "run", grid=ImposterGrid())) == [[0, 1], [0, 1, 2]]
    for name, reason in (("client-3", "has the key of client-3"), ("a-site", "claims .* of client-2, whose key it")):
        register(names | {103: name}, tmp_path, monkeypatch)
        with pytest.raises(FederationError, match=rf"node 103 \(partition-id 2\) {reason}"):
            run_federation(flat | {"failures": "strict"}, tmp_path / name, grid=ImposterGrid())


class ImposterCounter(ImposterGrid):
    """Counts the messages to node 103."""

    num_messages = 0

    def answer(self, message: Message) -> Message:
        self.num_messages += message.metadata.dst_node_id == 103
        return super().answer(message)


def test_a_connected_node_whose_key_was_removed_is_not_asked(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower counts it as connected until it misses its heartbeat."""
    nodes = [{"id": str(node), "key": "", "name": f"client-{node - 100}"} for node in (100, 101, 102)]
    (tmp_path / registration.KNOWN).write_text(json.dumps([*nodes, {"id": "103", "key": "", "name": ""}]))
    monkeypatch.setenv(registration.VARIABLE, str(tmp_path))
    grid = ImposterCounter()
    directory = run_federation(settings | {"num-clients": 0, "num-rounds": 2}, tmp_path / "run", grid=grid)
    assert clients(directory) == [[0, 1], [0, 1, 2]] and grid.num_messages == 0


class RestartedGrid(LocalGrid):
    """Flower still counts node 102 as connected and reports an error for its first handshake, with its own node id."""

    num_messages = 0

    def answer(self, message: Message) -> Message:
        self.num_messages += message.metadata.dst_node_id == 102
        if message.metadata.dst_node_id == 102 and self.num_messages == 1:
            reply = Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
            return reply
        return super().answer(message)


def test_a_restarting_node_is_asked_again(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0, "num-rounds": 1, "failures": "strict"}
    assert clients(run_federation(flat, tmp_path / "run", grid=RestartedGrid(3))) == [[0, 1, 2]]
    with pytest.raises(FederationError, match="node 102 failed at the handshake: no heartbeat"):
        run_federation(flat | {"node-timeout-s": 1e-3}, tmp_path / "gone", grid=RestartedGrid(3))


def test_over_sampling_needs_tolerant_failures() -> None:
    with pytest.raises(ConfigError, match="over-sample = 0.2 leaves the slowest clients out.*tolerant"):
        Config.from_flat({"over-sample": 0.2})
