"""A node that sends an invalid update: it is rejected, named in the journal and not averaged.

The oracle of each case is a run in which that client fails in that round: the final adapters are bitwise the same.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from copra_fl import wire
from copra_fl.adapters.state import difference, norm
from copra_fl.config import Config
from copra_fl.tensor_files import read_tensors
from server.errors import FederationError
from tests.support.federations import assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings

#: changes a reply, given the node's reply of the round before
Tamper = Callable[[RecordDict, RecordDict | None], object]
BAD_NODE, BAD_ROUND = 101, 2


class HostileGrid(LocalGrid):
    """One of three nodes tampers with its reply in round 2, or fails in that round if `tamper` is None."""

    def __init__(self, tamper: Tamper | None, message_type: str = "train") -> None:
        super().__init__(3)
        self.tamper, self.message_type = tamper, message_type
        self.earlier: RecordDict | None = None

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        metadata = message.metadata
        if metadata.dst_node_id != BAD_NODE or metadata.message_type != self.message_type:
            return reply
        if message.content["plan"]["server-round"] < BAD_ROUND:
            self.earlier = reply.content
            return reply
        if self.tamper is None:
            return Message(Error(code=0, reason="gone"), reply_to=message)
        self.tamper(reply.content, self.earlier)
        return reply


@pytest.fixture(scope="module")
def settings(tiny: Settings) -> Settings:
    flat = {"num-clients": 3, "failures": "tolerant", "max-update-norm": 5.0, "path-pairs": 0, "merge-gap-clients": 0}
    return tiny | flat


@pytest.fixture(scope="module")
def oracle(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, torch.Tensor]]:
    """The final adapter of the run in which the client fails in round 2."""
    yield final_adapter(run_federation(settings, tmp_path_factory.mktemp("oracle"), grid=HostileGrid(None)))


def values(change: Callable[[torch.Tensor], torch.Tensor]) -> Tamper:
    """Change the values of the client's adapter."""

    def tamper(content: RecordDict, earlier: RecordDict | None) -> None:
        adapter = wire.unpack_arrays(content, "adapters")["values"]
        content["adapters"] = ArrayRecord(torch_state_dict={"values": change(adapter)})

    return tamper


def bomb(content: RecordDict, earlier: RecordDict | None) -> None:
    """100 bytes whose header claims 40 terabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    content["adapters"] = ArrayRecord({"values": Array("float32", (10**13,), "numpy.ndarray", header.getvalue())})


def replay(content: RecordDict, earlier: RecordDict | None) -> None:
    """Send the reply of round 1 again."""
    assert earlier is not None
    for name in list(content):
        del content[name]
    for name, record in earlier.items():
        content[name] = record


def other_run(content: RecordDict, earlier: RecordDict | None) -> None:
    content["echo"]["run"] = "0123"


def oversized(content: RecordDict, earlier: RecordDict | None) -> None:
    content["more"] = ArrayRecord({"values": Array(np.zeros(10**6, np.float32))})


def scalars(**changes: float | list[float]) -> Tamper:
    """Change the client's scalars."""

    def tamper(content: RecordDict, earlier: RecordDict | None) -> None:
        (record,) = content.metric_records.values()
        for name, value in changes.items():
            record[name.replace("_", "-")] = value

    return tamper


CASES: dict[str, tuple[Tamper, str]] = {
    "nan": (values(lambda v: torch.full_like(v, torch.nan)), "has values that are not finite"),
    "one-inf": (values(lambda v: torch.cat([v[:-1], torch.tensor([torch.inf])])), "has values that are not finite"),
    "short": (values(lambda v: v[:-1]), "values should be"),
    "square": (values(lambda v: v[:4].view(2, 2)), "values should be"),
    "double": (values(torch.Tensor.double), "values should be"),
    "giant": (values(lambda v: v * 1e4), "client 1 has moved by .* more than max-update-norm = 5"),
    "longest": (values(lambda v: torch.full_like(v, 3e38)), "more than max-update-norm = 5"),
    "bomb": (bomb, "Unable to allocate|EOF: reading array data"),
    "count": (scalars(num_examples=10**9), "claims 1000000000 examples; at the start it had"),
    "negative": (scalars(num_examples=-3), "claims -3 examples"),
    "steps": (scalars(active_steps=[10**9] * 3), "claims 1000000000 active steps of a layer; a round has 3"),
    "loss": (scalars(loss=float("nan")), "a training loss of nan"),
    "metric": (scalars(examples=1.0), "reports examples; known are"),
    "negative-seconds": (scalars(seconds=-1.0), "reports seconds = -1.0, which is below 0"),
    "endless": (scalars(distance=1e308), "reports distance = 1e\\+308, which is not finite or far too large"),
    "no-steps": (lambda content, earlier: content["metrics-1"].pop("steps"), "does not report steps"),
    "replay": (replay, "it answers round 1 of run .*, not round 2"),
    "other-run": (other_run, "it answers round 2 of run 0123, not round 2"),
    "oversized": (oversized, "bytes; a reply to this message has at most"),
    "no-record": (lambda content, earlier: content.pop("metrics-1"), "the metrics of client 1 are missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_invalid_update_is_rejected_and_not_averaged(
    settings: Settings, oracle: dict[str, torch.Tensor], case: str, tmp_path: Path
) -> None:
    tamper, reason = CASES[case]
    directory = run_federation(settings, tmp_path / "run", grid=HostileGrid(tamper))
    first, second = journal(directory)
    assert [client["client"] for client in first["clients"]] == [0, 1, 2] and not first["missing"]
    assert [client["client"] for client in second["clients"]] == [0, 2]
    (missing,) = second["missing"]
    assert missing["client"] == 1
    assert missing["reason"].startswith("its node's reply was rejected: ")
    assert re.search(reason, missing["reason"])
    assert_equal(final_adapter(directory), oracle)


def test_an_honest_run_is_accepted_and_differs_from_the_oracle(
    settings: Settings, oracle: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """This shows that the cases above can fail."""
    directory = run_federation(settings, tmp_path / "run", grid=HostileGrid(lambda content, earlier: None))
    assert [row["missing"] for row in journal(directory)] == [[], []]
    assert not torch.equal(final_adapter(directory)["head.weight"], oracle["head.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accuracy": 1.5}, "an accuracy of 1.5"),
        ({"loss": float("inf")}, "its loss is inf"),
        ({"loss": 1e308}, "a loss of 1e+308"),
        ({"examples": 10**6}, "claims 1000000 validation examples"),
    ],
)
def test_an_impossible_evaluation_is_left_out(
    settings: Settings, changes: dict[str, float], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = HostileGrid(scalars(**changes), "evaluate")
    with caplog.at_level("INFO", logger="flwr"):
        directory = run_federation(settings, tmp_path / "run", grid=grid)
    summary = json.loads((directory / "summary.json").read_text())
    assert len(summary["clients"]) == 2
    assert reason in caplog.text


def test_final_evaluations_that_are_not_finite_are_left_out_of_the_summary(settings: Settings, tmp_path: Path) -> None:
    class AllGrid(LocalGrid):
        def answer(self, message: Message) -> Message:
            reply = super().answer(message)
            if message.metadata.message_type == "evaluate":
                for record in reply.content.metric_records.values():
                    record["loss"] = float("nan")
            return reply

    directory = run_federation(settings, tmp_path / "run", grid=AllGrid(3))
    assert json.loads((directory / "summary.json").read_text())["clients"] == []


class LyingGrid(LocalGrid):
    """Three nodes, of which one changes its handshake."""

    def __init__(self, changes: dict[str, object]) -> None:
        super().__init__(3)
        self.changes = changes

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.dst_node_id == BAD_NODE and message.metadata.message_type == "query":
            reply.content["handshake"] = ConfigRecord({**reply.content["handshake"], **self.changes})
        return reply


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num-examples": [10, 10, 10]}, r"node 101 \(partition-id 1\) has \(10, .*other nodes \("),
        ({"clients": [0, 1, 7]}, "examples of a client 7"),
        ({"num-examples": [-1, -1, -1]}, "num-examples = -1 is not a whole number"),
        ({"num-examples": ["x", "x", "x"]}, "num-examples = 'x' is not a whole number"),
        ({"num-examples": [1.5, 1.5, 1.5]}, "num-examples = 1.5 is not a whole number"),
        ({"num-examples": [2**62] * 3}, "is not a whole number from 0 to 1000000000"),
        ({"num-validation": [True, True, True]}, "num-validation = True is not a whole number"),
        ({"num-clients": 3 * 10**7}, "num-clients = 30000000 is not a whole number"),
        ({"partition": -1}, "partition = -1 is not a whole number"),
        ({"partition": 0}, "has the same partition-id as node 100"),
        ({"clients": []}, "node 101 sent an unreadable handshake"),
        ({"digest": "0" * 10**6}, "runs other sources"),
        ({"label-names": ["a", "b"]}, "node 101 .* has the labels"),
        ({"rejection-reason": "\x1b[2Jno\nround 2: validation ..."}, r"rejected the run: \[2Jno \| round 2"),
    ],
)
def test_an_impossible_handshake_stops_a_strict_run_and_costs_a_node_its_place_in_a_tolerant_one(
    settings: Settings, changes: dict[str, object], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FederationError, match=reason):
        run_federation(settings | {"failures": "strict"}, tmp_path / "strict", grid=LyingGrid(changes))
    with caplog.at_level("WARNING", logger="flwr"):
        directory = run_federation(settings | {"num-rounds": 1}, tmp_path / "tolerant", grid=LyingGrid(changes))
    assert re.search(f"a node is left out: .*{reason}", caplog.text)
    assert [client["client"] for client in journal(directory)[0]["clients"]] == [0, 1, 2], "others can host client 1"


def huge(value: float) -> Tamper:
    return values(lambda v: torch.full_like(v, value))


@pytest.mark.parametrize("value", [3e38, 1e20, 1e4])
def test_by_default_an_update_far_longer_than_the_others_is_left_out(
    settings: Settings, oracle: dict[str, torch.Tensor], value: float, tmp_path: Path
) -> None:
    default = {"max-update-norm": Config().federation.max_update_norm}
    directory = run_federation(settings | default, tmp_path / "run", grid=HostileGrid(huge(value)))
    (missing,) = journal(directory)[1]["missing"]
    assert missing["client"] == 1
    if value > 1e6:
        assert re.search(r"has moved by \S+, more than max-update-norm = 1e\+06", missing["reason"])
    else:
        assert re.fullmatch(
            r"the norm of its change is \S+ times the median of the round, more than .* = 100", missing["reason"]
        )
    assert_equal(final_adapter(directory), oracle)


@pytest.mark.parametrize(
    ("value", "reason"), [(1e4, " times the median of the round, more than max-update-ratio"), (1e20, ", more than 1e")]
)
def test_a_control_variate_far_longer_than_the_others_is_left_out(
    settings: Settings, value: float, reason: str, tmp_path: Path
) -> None:
    def tamper(content: RecordDict, earlier: RecordDict | None) -> None:
        controls = wire.unpack_arrays(content, "controls")["values"]
        content["controls"] = ArrayRecord(torch_state_dict={"values": torch.full_like(controls, value)})

    directory = run_federation(settings | {"control-variates": True}, tmp_path / "run", grid=HostileGrid(tamper))
    (missing,) = journal(directory)[1]["missing"]
    assert missing["client"] == 1
    assert re.search(rf"the norm of its controls is \S+{reason}", missing["reason"])


class SpoiledGrid(LocalGrid):
    """In one round all values of the updates of some nodes are huge: `values` is node -> value."""

    def __init__(self, server_round: int, values: dict[int, float]) -> None:
        super().__init__(3)
        self.server_round, self.values = server_round, values

    def answer(self, message: Message) -> Message:
        reply, node = super().answer(message), message.metadata.dst_node_id
        is_train = message.metadata.message_type == "train"
        if is_train and message.content["plan"]["server-round"] == self.server_round and node in self.values:
            huge(self.values[node])(reply.content, None)
        return reply


#: two clients have no median that would say which of them is wrong
PAIR = {"num-clients": 2, "max-update-norm": 0.0, "num-rounds": 3}


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({}, 3e38),
        ({}, 1e20),
        ({"rule": "flora", "local-training": "lora"}, 1e20),
        ({"server-optimizer": "fedadam"}, 3e38),  # at 1e20 its second moment is finite: its steps stay short
    ],
)
def test_a_state_that_does_not_work_is_refused_and_the_run_goes_on(
    settings: Settings, changes: Settings, value: float, tmp_path: Path
) -> None:
    grid = SpoiledGrid(BAD_ROUND, {BAD_NODE: value})
    directory = run_federation(settings | PAIR | changes, tmp_path / "run", grid=grid)
    first, second, third = journal(directory)
    assert {missing["client"] for missing in second["missing"]} == {0, 1} and not second["clients"]
    assert re.search(
        r"refused: the new global adapter .*; the longest update is that of client 1", second["notes"]["refused"]
    )
    assert second["validation"]["loss"] == pytest.approx(first["validation"]["loss"])
    assert len(third["clients"]) == 2 and not third["missing"]
    assert all(torch.isfinite(tensor).all() for tensor in final_adapter(directory).values())


SGD = {"optimizer": "sgd", "learning-rate": 0.1, "head-learning-rate": 0.1, "local-training": "lora"}


@pytest.mark.parametrize(
    ("older", "newest"),
    [
        ({"stale-clients": 0.5, "staleness": 2}, {}),
        (SGD | {"gucci-beta": 0.5, "gucci-anchors": 3}, SGD | {"gucci-beta": 0.5}),
    ],
)
def test_after_a_refused_first_round_older_adapters_are_the_initial_one(
    settings: Settings, older: Settings, newest: Settings, tmp_path: Path
) -> None:
    """So round 2 is that of a run whose clients need the newest adapter alone; and round 3 trains."""
    runs = [
        run_federation(settings | PAIR | changes, tmp_path / name, grid=SpoiledGrid(1, {BAD_NODE: 1e20}))
        for name, changes in (("older", older), ("newest", newest))
    ]
    assert [len(row["clients"]) for row in journal(runs[0])] == [0, 2, 2]
    second, expected = (read_tensors(run / "checkpoints" / "round-00002.safetensors")[0] for run in runs)
    assert norm(difference(expected, second)) < 1e-6 * norm(expected)


def test_a_refused_first_round_with_own_starts_stops_the_run_which_can_be_resumed(
    settings: Settings, tmp_path: Path
) -> None:
    """All clients would start from the common A in round 2."""
    flat = settings | PAIR | {"start": "own"}
    with pytest.raises(FederationError, match="round 1 is refused: .* --resume does the round again"):
        run_federation(flat, tmp_path / "run", grid=SpoiledGrid(1, {BAD_NODE: 1e20}))
    resumed, whole = run_federation(flat, tmp_path / "run"), run_federation(flat, tmp_path / "whole")
    assert_equal(final_adapter(resumed), final_adapter(whole))
    later = run_federation(flat, tmp_path / "later", grid=SpoiledGrid(2, {BAD_NODE: 1e20}))
    assert [len(row["clients"]) for row in journal(later)] == [2, 0, 2]


def test_a_refused_round_does_not_name_a_client_that_was_left_out(settings: Settings, tmp_path: Path) -> None:
    """The update of client 1 is 1000 times as long as those of the others, which ruin the average without it."""
    grid = SpoiledGrid(BAD_ROUND, {100: 1e20, 101: 1e23, 102: 1e20})
    directory = run_federation(settings | {"max-update-norm": 0.0}, tmp_path / "run", grid=grid)
    notes = journal(directory)[1]["notes"]
    assert re.search("the longest update is that of client [02],", notes["refused"])


def test_a_strict_run_that_refuses_a_state_can_be_resumed(settings: Settings, tmp_path: Path) -> None:
    flat = settings | PAIR | {"failures": "strict"}
    with pytest.raises(FederationError, match="round 2 is refused: .* client 1, .* --resume does the round again"):
        run_federation(flat, tmp_path / "run", grid=HostileGrid(huge(3e38)))
    resumed, whole = run_federation(flat, tmp_path / "run"), run_federation(flat, tmp_path / "whole")
    assert_equal(final_adapter(resumed), final_adapter(whole))


def test_a_long_error_text_with_control_characters_is_cut_and_cleaned(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the node, and of a single client."""
    text = "\x1b[2Jboom\n2026 round 2: validation loss 0.0\n" + "A" * 10**6 + "the cause"

    class Shouting(LocalGrid):
        def answer(self, message: Message) -> Message:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            if kind == "train" and node == BAD_NODE:
                return Message(Error(code=0, reason=text), reply_to=message)
            reply = super().answer(message)
            if kind == "train" and node == BAD_NODE + 1:
                reply.content["failures"] = ConfigRecord({"2": text.replace("A" * 10**5, "A")})
            return reply

    with caplog.at_level("INFO", logger="flwr"):
        directory = run_federation(settings, tmp_path / "run", grid=Shouting(3))
    for row in journal(directory):
        assert [missing["client"] for missing in row["missing"]] == [1, 2]
        for missing in row["missing"]:
            assert len(missing["reason"]) <= 2000 and missing["reason"].endswith("the cause")
            assert missing["reason"].isprintable()
    assert "\x1b" not in caplog.text and "\n2026 round 2" not in caplog.text
