"""Runs with secure aggregation: the real apps, with nodes that drop out, lie and listen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from clients import handlers
from clients.node_config import Rejected
from copra_fl import secure_wire, wire
from copra_fl.aggregation.rules.fedavg import weighted_average
from copra_fl.aggregation.secure_sums import pooled_update, total_weights, vector_of, vector_size
from copra_fl.records import NodeRecord, read_records
from copra_fl.secure_aggregation import fixed_point
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.secure_aggregation.keys import new_identity, public_identity
from server.errors import FederationError
from tests.support import rounds
from tests.support.federations import assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.secure import node_configs_with_peers
from tests.support.tiny import Settings

#: what secure aggregation sets is here as well, for runs to compare with that are without
SECURE = {"secure-aggregation": True, "updates": "pooled", "merge-gap-clients": 0, "path-pairs": 0,
          "max-update-ratio": 0.0, "local-steps": 2, "client-eval-examples": 4}  # fmt: skip
TOLERANT = {"failures": "tolerant"}


class SecureGrid(LocalGrid):
    """Fails the answers of `drops` (message type -> partition-ids) in round `drop_round`, changes others, records all.

    A change is called with a message's type, the partition-id and the answer's content.
    """

    def __init__(
        self, num_nodes: int, drops: dict[str, list[int]] | None = None, drop_round: int = 1,
        change: Callable[[str, int, RecordDict], None] = lambda kind, node, content: None,
        node_configs: Sequence[dict[str, str | int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_nodes, node_configs=node_configs)
        self.drops, self.drop_round, self.change = drops or {}, drop_round, change
        self.received: list[Message] = []
        self.types: list[str] = []
        self.rounds = 0

    def answer(self, message: Message) -> Message:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id - 100
        self.types.append(kind)
        if kind == "query.keys" and node == min(c - 100 for c in self.contexts):
            self.rounds += 1
        reply = super().answer(message)
        if reply.has_content():
            self.change(kind, node, reply.content)
            self.received.append(reply)
        if self.rounds == self.drop_round and node in self.drops.get(kind, []):
            return Message(RecordDict(), reply_to=message)  # nothing that it can read
        return reply


# ---------------------------------------------------------------- updates as vectors


@pytest.mark.parametrize("weighting", ["examples", "activity"])
def test_the_sum_of_vectors_gives_the_weighted_average_of_all_clients(weighting: str) -> None:
    """Independent: the rule's own average over the single clients; five clients on two nodes, some layers off."""
    start = rounds.random_adapter(99)
    active = [(3, 0), (2, 1), (0, 0), (3, 2), (1, 0)]
    updates = [rounds.update(k, rounds.random_adapter(k), 10 + k, active[k]) for k in range(5)]
    scale = fixed_point.scale_for(1e6 * 200, 2)
    nodes = [updates[:2], updates[2:]]
    vectors = [vector_of(start, of, weighting, rounds.GROUP_OF, 2, scale, 2) for of in nodes]
    assert {len(vector) for vector in vectors} == {vector_size(start, weighting, 2)}
    total = vectors[0] + vectors[1]
    pooled = pooled_update(total, start, updates, weighting, rounds.GROUP_OF, 2, scale)
    expected = weighted_average(start, updates, weighting, rounds.GROUP_OF)
    assert pooled.num_examples == sum(range(10, 15))
    for name, tensor in expected.items():
        assert torch.allclose(pooled.adapter.get(name, start[name]), tensor, rtol=2e-7, atol=1e-9), name
    with pytest.raises(SecureAggregationError, match="does not have the weights that the clients report"):
        pooled_update(vectors[0], start, updates, weighting, rounds.GROUP_OF, 2, scale)
    assert total_weights(updates, weighting, 2)[0] == 60


class PlainGrid(SecureGrid):
    """Without steps of secure aggregation, every round is the one in which nodes drop out."""

    def answer(self, message: Message) -> Message:
        self.rounds = self.drop_round
        return super().answer(message)


#: five nodes of one client each, of which two may drop out
FIVE = {"num-rounds": 1, "num-clients": 5, "secure-threshold": 0.6}


@pytest.fixture(scope="module")
def plain_runs(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Pooled runs without masks, with all nodes (False) and without node 0 (True)."""
    settings = dict(tiny) | SECURE | TOLERANT | FIVE | {"secure-aggregation": False}
    return {
        is_missing: run_federation(settings, tmp_path_factory.mktemp("plain"), grid=PlainGrid(5, drops))
        for is_missing, drops in ((False, {}), (True, {"train": [0]}))
    }


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def undisturbed(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SecureGrid]:
    grid = SecureGrid(3)
    return run_federation(dict(tiny) | SECURE, tmp_path_factory.mktemp("secure"), grid=grid), grid


def test_a_run_gives_the_adapter_of_the_pooled_run_and_is_repeatable(
    tiny: Settings, undisturbed: tuple[Path, SecureGrid], tmp_path: Path
) -> None:
    directory, grid = undisturbed
    again = run_federation(dict(tiny) | SECURE, tmp_path / "again", grid=SecureGrid(3))
    assert_equal(final_adapter(again), final_adapter(directory))
    plain = run_federation(dict(tiny) | SECURE | {"secure-aggregation": False}, tmp_path / "plain", num_nodes=3)
    secure, pooled = final_adapter(directory), final_adapter(plain)
    error = journal(directory)[0]["notes"]["secure_aggregation"]["error"]
    assert 0 < error < 1e-9, "the stated error, below that of float32"
    for name, tensor in pooled.items():
        assert torch.allclose(secure[name], tensor, rtol=1e-5, atol=1e-6), name
    one_round = [["query.keys"] * 3, ["query.shares"] * 3, ["train"] * 3, ["query.survivors"] * 3,
                 ["query.unmask"] * 3]  # fmt: skip
    types = [kind for step in one_round for kind in step]
    assert grid.types == ["query"] * 3 + types * 2 + ["evaluate"] * 3
    for context in grid.contexts.values():
        assert not [name for name in context.state if name.startswith("secure") and name != "secure-identity"]


def test_no_message_to_the_server_has_a_plain_vector(tiny: Settings, tmp_path: Path) -> None:
    """Search every byte for the vector that a node would send in a pooled run, in float32 and in fixed point."""
    plain = SecureGrid(3)
    settings = dict(tiny) | SECURE | {"num-rounds": 1}
    run_federation(settings | {"secure-aggregation": False}, tmp_path / "plain", grid=plain)
    pooled = [
        wire.unpack_arrays(reply.content, "pooled")["values"].numpy()
        for reply in plain.received
        if "pooled" in reply.content.array_records
    ]
    assert len(pooled) == 3
    secure = SecureGrid(3)
    run_federation(settings, tmp_path / "secure", grid=secure)
    received = (
        b"".join(
            array.data
            for reply in secure.received
            for record in reply.content.array_records.values()
            for array in record.values()
        )
        + repr([reply.content for reply in secure.received]).encode()
    )
    for vector in pooled:
        moved = vector[np.abs(vector) > 0]
        for kind in (np.float32, np.float64):
            text = moved.astype(kind).tobytes()
            pieces = [text[place : place + 16] for place in range(0, len(text) - 16, 16)]
            assert len(pieces) > 20 and not any(piece in received for piece in pieces)
    (masked, *_) = [r.content for r in secure.received if "masked" in r.content.array_records]
    assert set(masked.array_records) == {"masked"}


@pytest.mark.parametrize(
    ("drops", "missing"),
    [
        ({"query.keys": [0]}, "step 'keys'"),
        ({"query.shares": [0]}, "step 'shares'"),
        ({"train": [0]}, "reply was rejected"),
        ({"query.survivors": [0]}, ""),
        ({"query.unmask": [0]}, ""),
        ({"query.shares": [0], "query.unmask": [3]}, "step 'shares'"),
    ],
)
def test_a_node_that_drops_out_costs_its_own_clients_only(
    tiny: Settings, plain_runs: dict[bool, Path], tmp_path: Path, drops: dict[str, list[int]], missing: str
) -> None:
    """The same as a pooled run in which the node does not train: its clients are not in the sum, all others are."""
    settings = dict(tiny) | SECURE | TOLERANT | FIVE
    directory = run_federation(settings, tmp_path / "run", grid=SecureGrid(5, drops))
    (row,) = journal(directory)
    gone = [client["reason"] for client in row["missing"]]
    assert len(gone) == (1 if missing else 0) and all(missing in reason for reason in gone)
    assert len(row["clients"]) == 5 - len(gone)
    for name, tensor in final_adapter(plain_runs[bool(missing)]).items():
        assert torch.allclose(final_adapter(directory)[name], tensor, rtol=1e-5, atol=1e-6), name


class SlowGrid(SecureGrid):
    """Delivers one reply at a time, so that the last ones come when enough have."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(sorted(message_ids & self.replies.keys())[:1])


def test_a_node_whose_answer_was_not_needed_has_not_dropped_out(tiny: Settings, tmp_path: Path) -> None:
    grid = SlowGrid(5)
    rows = journal(run_federation(dict(tiny) | SECURE | TOLERANT | FIVE, tmp_path / "run", grid=grid))
    assert grid.replies, "some answers were not waited for"
    assert [row["notes"]["secure_aggregation"]["refused"] for row in rows] == [[]] * len(rows)
    assert not [row["missing"] for row in rows if row["missing"]]


def test_below_the_threshold_a_run_stops_by_name_and_its_checkpoint_resumes(
    tiny: Settings, undisturbed: tuple[Path, SecureGrid], tmp_path: Path
) -> None:
    settings = dict(tiny) | SECURE | TOLERANT
    reason = (
        r"round 2: secure aggregation failed: 1 of 3 nodes have sent shares.*client 0: its node dropped out in step"
    )
    with pytest.raises(FederationError, match=reason):
        run_federation(settings, tmp_path / "run", grid=SecureGrid(3, {"query.shares": [0, 1]}, drop_round=2))
    assert [row["round"] for row in journal(tmp_path / "run")] == [1]
    resumed = run_federation(settings, tmp_path / "run", grid=SecureGrid(3))
    assert_equal(final_adapter(resumed), final_adapter(undisturbed[0]))


def test_a_node_alone_and_a_strict_run_stop_with_the_reason(tiny: Settings, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="1 node takes part; secure aggregation needs at least 2"):
        run_federation(dict(tiny) | SECURE, tmp_path / "alone", num_nodes=1)
    with pytest.raises(FederationError, match="client . failed in round 1 .* dropped out in step 'keys'"):
        run_federation(dict(tiny) | SECURE, tmp_path / "strict", grid=SecureGrid(3, {"query.keys": [1]}))


def change_signature(kind: str, node: int, content: RecordDict) -> None:
    if kind == "query.keys" and node == 1:
        (signature,) = content.config_records["secure-keys"]["signature"]  # type: ignore[misc]
        content.config_records["secure-keys"]["signature"] = [signature[:-1] + b"\0"]


def change_confirmation(kind: str, node: int, content: RecordDict) -> None:
    if kind == "query.survivors" and node == 1:
        content.config_records["secure-confirmed"]["signature"] = b"signature"


def change_share(kind: str, node: int, content: RecordDict) -> None:
    if kind == "query.unmask" and node == 1:
        shares = content.config_records["secure-seeds"]["shares"]
        content.config_records["secure-seeds"]["shares"] = [bytes(len(share)) for share in shares]  # type: ignore


def change_vector(kind: str, node: int, content: RecordDict) -> None:
    if kind == "train" and node == 1:
        content["masked"] = wire._pack_arrays(
            {"values": torch.zeros_like(wire.unpack_arrays(content, "masked")["values"])}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_signature, "1 node takes part.*; client 1: .* keys of node 1 are not signed by it for round 1"),
        (change_confirmation, "1 of 2 nodes have signed .*; client 1: .* list of survivors is not signed by node 1"),
        (change_share, "node 1 has revealed a wrong share of the seed of node ."),
        (change_vector, "does not have the weights that the clients report"),
    ],
)
def test_what_was_changed_on_the_way_is_refused_by_name(
    tiny: Settings, tmp_path: Path, change: Callable[[str, int, RecordDict], None], message: str
) -> None:
    with pytest.raises(FederationError, match=message):
        run_federation(dict(tiny) | SECURE | TOLERANT, tmp_path / "run", grid=SecureGrid(2, change=change))


class ReplayingGrid(SecureGrid):
    """Sends each node the messages of steps 2 to 5 twice; the first answer counts."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__(num_nodes)
        self.errors: dict[str, list[str]] = {}

    def answer(self, message: Message) -> Message:
        reply, kind = super().answer(message), message.metadata.message_type
        if kind in ("query.shares", "train", "query.survivors", "query.unmask"):
            second = LocalGrid.answer(self, message)
            self.errors.setdefault(kind, []).append(second.error.reason if second.has_error() else "")
        return reply


def test_a_node_answers_each_step_once(tiny: Settings, tmp_path: Path) -> None:
    grid = ReplayingGrid(3)
    run_federation(dict(tiny) | SECURE | {"num-rounds": 1}, tmp_path / "run", grid=grid)
    for kind, reason in (
        ("query.shares", "has not made keys for this step, or has used them"),
        ("train", "has sent its vector of this round already"),
        ("query.survivors", "has signed a list of survivors of this round already"),
        ("query.unmask", "takes part in no round, or has revealed its shares"),
    ):
        assert len(grid.errors[kind]) == 3 and all(reason in error for error in grid.errors[kind]), kind


def test_nodes_that_know_their_peers_refuse_others(tiny: Settings, tmp_path: Path) -> None:
    """A server that stands in the middle needs a key that the peers' folder does not have."""
    configs = node_configs_with_peers(tmp_path, 3)
    settings = dict(tiny) | SECURE | {"num-rounds": 1}
    run_federation(settings, tmp_path / "right", grid=SecureGrid(3, node_configs=configs))
    (tmp_path / "peers" / "client-2.pub").write_bytes(public_identity(new_identity()))
    reason = "secure aggregation: node 2 signs with another key than the registered one"
    with pytest.raises(FederationError, match=reason):
        run_federation(settings, tmp_path / "wrong", grid=SecureGrid(3, node_configs=configs))


@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "activity", "layers-per-round": 2},
        pytest.param({"rule": "rolora", "server-optimizer": "fedadam", "engine": "peft"}, marks=pytest.mark.slow),
        pytest.param({"rule": "fed-sb", "local-training": "lora"}, marks=pytest.mark.slow),
    ],
)
def test_other_settings_give_what_their_pooled_run_gives(tiny: Settings, tmp_path: Path, changes: Settings) -> None:
    settings = dict(tiny) | SECURE | {"num-rounds": 1} | changes
    secure = run_federation(settings, tmp_path / "secure", grid=SecureGrid(2))
    plain = run_federation(settings | {"secure-aggregation": False}, tmp_path / "plain", num_nodes=2)
    for name, tensor in final_adapter(plain).items():
        assert torch.allclose(final_adapter(secure)[name], tensor, rtol=1e-4, atol=1e-5), name


def test_a_node_with_its_own_data_says_why_too() -> None:
    """Such a node hides the text of other errors, because it could quote its data."""
    config: dict[str, str | int] = {"partition-id": 0, "num-partitions": 2, "data-path": "/data/secret.csv"}
    context = Context(1, 100, config, RecordDict(), {})
    with pytest.raises(Rejected, match="secure aggregation: node 0 takes part in no round"):
        handlers.HANDLERS["unmask"](secure_wire.pack_survivors([0, 1]), context)


class CountingGrid(LocalGrid):
    """Counts what passes to and from node 100, except configurations; and the messages."""

    def __init__(self, node: dict[str, str | int]) -> None:
        super().__init__(2, node_configs=[node, {}])
        self.kinds: list[str] = []
        self.bytes = 0

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.dst_node_id == 100:
            self.kinds.append(message.metadata.message_type.removeprefix("query."))
            configurations = {"config", "query", "plan", "state-delta", "handshake", "echo", "failures"}
            contents = [message.content] + ([reply.content] if reply.has_content() else [])
            records = [record for content in contents for name, record in content.items() if name not in configurations]
            self.bytes += sum(record.count_bytes() for record in records)
        return reply


def test_the_steps_are_in_the_audit_log_of_a_node_with_their_bytes(tiny: Settings, tmp_path: Path) -> None:
    grid = CountingGrid({"audit-path": str(tmp_path / "audit")})
    run = run_federation(dict(tiny) | SECURE, tmp_path / "run", grid=grid)
    lines, num_damaged = read_records(NodeRecord, [tmp_path / "audit" / "audit.jsonl"])
    steps = ["keys", "shares", "train", "survivors", "unmask"]
    assert [line.kind for line in lines] == ["handshake", *steps, *steps, "evaluate"] and not num_damaged
    assert ["query" if kind == "handshake" else kind for kind in (line.kind for line in lines)] == grid.kinds
    assert [line.round for line in lines] == [0, *[1] * 5, *[2] * 5, 2]
    run_id = json.loads((run / "provenance.json").read_text())["run"]
    assert {(line.run, line.decision) for line in lines[1:]} == {(run_id, "accepted")}
    assert all(line.bytes_down and line.bytes_up for line in lines[1:])
    assert (lines[-1].total_bytes, lines[-1].total_rounds) == (grid.bytes, 2)


def test_the_steps_count_for_the_policy_of_a_node(tiny: Settings, tmp_path: Path) -> None:
    """Its keys alone, with their signature, have more than 100 bytes."""
    (tmp_path / "policy.toml").write_text("max-mb = 1e-4")
    node = {"policy-path": str(tmp_path / "policy.toml"), "audit-path": str(tmp_path / "audit")}
    reason = "dropped out in step 'keys' .*: client policy: messages and replies of all runs have more than max-mb"
    with pytest.raises(FederationError, match=reason):
        run_federation(dict(tiny) | SECURE, tmp_path / "run", grid=CountingGrid({**node}))
    (_, line), _ = read_records(NodeRecord, [tmp_path / "audit" / "audit.jsonl"])
    assert (line.kind, line.decision, line.bytes_up) == ("keys", "rejected", 0)
    assert line.reason.startswith("client policy: messages and replies of all runs have more than max-mb = 0.0001: ")
