"""A round ends: with enough replies, at its deadline, or in an error that can be resumed from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from copra_fl.config import Config, ConfigError
from copra_fl.provenance import library_digest
from copra_fl.wire import Hello, pack_hello
from server.handshake import CLIENTS
from server.strategy import FederationError
from tests.support.federations import final_adapter
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings


class SilentGrid(LocalGrid):
    """Nodes that say nothing in some rounds: node -> rounds."""

    def __init__(self, silent: dict[int, set[int]], num_nodes: int = 3) -> None:
        super().__init__(num_nodes)
        self.silent = silent

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            (number,) = super().push_messages([message])
            about, is_training = message.metadata, message.metadata.message_type == "train"
            if is_training and message.content["plan"]["server-round"] in self.silent.get(about.dst_node_id, ()):
                del self.replies[number]
            yield number


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    flat = {"num-clients": 3, "num-rounds": 3, "failures": "tolerant", "merge-gap-clients": 0, "path-pairs": 0}
    return tiny | flat | {"round-timeout-s": 5.0}


def journal(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]


def clients(directory: Path) -> list[list[int]]:
    return [[client["client"] for client in row["clients"]] for row in journal(directory)]


def test_a_lost_client_is_named_and_not_waited_for_beyond_the_deadline(settings: Settings, tmp_path: Path) -> None:
    """Client 1 is away in round 2, and back in round 3."""
    directory = run_federation(settings, tmp_path / "run", grid=SilentGrid({101: {2}}))
    assert clients(directory) == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert [row["missing"] for row in journal(directory)] == [
        [],
        [{"client": 1, "reason": "no reply within round-timeout-s = 5 s"}],
        [],
    ]
    assert journal(directory)[1]["seconds"] >= 5


def test_a_round_that_cannot_reach_k_stops_and_can_be_resumed(settings: Settings, tmp_path: Path) -> None:
    """Bitwise as if nothing had been."""
    flat = settings | {"min-replies": 2, "round-timeout-s": 2.0}
    with pytest.raises(FederationError, match="^round 2: 1 good replies, min-replies = 2; missing clients: 0: no"):
        run_federation(flat, tmp_path / "run", grid=SilentGrid({100: {2}, 101: {2}}))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-00001.safetensors"]
    resumed = run_federation(flat, tmp_path / "run", grid=LocalGrid(3))
    whole = run_federation(flat, tmp_path / "whole", grid=LocalGrid(3))
    got, wanted = final_adapter(resumed), final_adapter(whole)
    assert clients(resumed) == [[0, 1, 2]] * 3 and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_over_sampling_takes_the_first_and_waits_for_no_more(settings: Settings, tmp_path: Path) -> None:
    """2 of 3 clients are wanted and 3 are asked. In round 1 client 0 never answers, in round 2 client 2."""
    flat = settings | {"clients-per-round": 2, "over-sample": 0.5, "round-timeout-s": 600.0, "num-rounds": 2}
    directory = run_federation(flat, tmp_path / "run", grid=SilentGrid({100: {1}, 102: {2}}))
    assert clients(directory) == [[1, 2], [0, 1]]
    reason = "not among the first 2 clients"
    assert [row["missing"] for row in journal(directory)] == [
        [{"client": 0, "reason": reason}],
        [{"client": 2, "reason": reason}],
    ]


class LateGrid(LocalGrid):
    """Nodes connect one after the other, one with each look."""

    looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return list(self.contexts)[: self.looks]


def test_a_run_waits_for_its_nodes(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0, "num-rounds": 1, "failures": "strict"}
    assert clients(run_federation(flat | {"min-nodes": 3}, tmp_path / "run", grid=LateGrid(3))) == [[0, 1, 2]]
    with pytest.raises(FederationError, match="3 nodes connected within node-timeout-s = 2 s; min-nodes = 4"):
        run_federation(flat | {"min-nodes": 4, "node-timeout-s": 2.0}, tmp_path / "few", grid=LateGrid(3))


class JoiningGrid(LocalGrid):
    """Node 102 connects after the first round's training; with `other` it runs other code than the others."""

    def __init__(self, other: ClientApp | None = None) -> None:
        super().__init__(3)
        self.other, self.has_begun = other, False

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts) if self.has_begun else [100, 101]

    def answer(self, message: Message) -> Message:
        self.has_begun |= message.metadata.message_type == "train"
        if self.other and message.metadata.dst_node_id == 102:
            return self.other(message, self.contexts[102])
        return super().answer(message)


def test_a_client_that_joins_late_trains_from_the_next_round_on(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0}
    assert clients(run_federation(flat, tmp_path / "run", grid=JoiningGrid())) == [[0, 1], [0, 1, 2], [0, 1, 2]]


def test_a_late_node_that_does_not_fit_is_left_out(settings: Settings, tmp_path: Path) -> None:
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        refusing = Hello(partition=2, digest=library_digest(CLIENTS), refusal="it has no data")
        return Message(pack_hello(refusing), reply_to=message)

    directory = run_federation(settings | {"num-clients": 0}, tmp_path / "run", grid=JoiningGrid(app))
    assert clients(directory) == [[0, 1]] * 3


class RestartedGrid(LocalGrid):
    """Flower still takes the last node to be connected, and answers its first hello in its place, as itself."""

    asked = 0

    def answer(self, message: Message) -> Message:
        self.asked += message.metadata.dst_node_id == 102
        if message.metadata.dst_node_id == 102 and self.asked == 1:
            reply = Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
            return reply
        return super().answer(message)


def test_a_node_that_is_not_back_yet_is_asked_again(settings: Settings, tmp_path: Path) -> None:
    flat = settings | {"num-clients": 0, "num-rounds": 1, "failures": "strict"}
    assert clients(run_federation(flat, tmp_path / "run", grid=RestartedGrid(3))) == [[0, 1, 2]]
    with pytest.raises(FederationError, match="node 102 failed at hello: no heartbeat"):
        run_federation(flat | {"node-timeout-s": 1e-3}, tmp_path / "gone", grid=RestartedGrid(3))


def test_over_sampling_needs_tolerance() -> None:
    with pytest.raises(ConfigError, match="over-sample = 0.2 leaves the slowest clients out.*tolerant"):
        Config.from_flat({"over-sample": 0.2})
