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
        ({"loss": float("inf")}, "a loss of inf"),
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num-examples": [10, 10, 10]}, r"node 101 \(partition-id 1\) has \(10, .*other nodes \("),
        ({"clients": [0, 1, 7]}, "examples of a client 7"),
        ({"num-examples": [-1, -1, -1]}, "has -1 and .* examples of a client 0"),
        ({"clients": []}, "node 101 sent an unreadable handshake"),
    ],
)
def test_an_impossible_handshake_stops_the_run_and_names_its_node(
    settings: Settings, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    class LyingGrid(LocalGrid):
        def answer(self, message: Message) -> Message:
            reply = super().answer(message)
            if message.metadata.dst_node_id == BAD_NODE:
                reply.content["handshake"] = ConfigRecord({**reply.content["handshake"], **changes})
            return reply

    with pytest.raises(FederationError, match=reason):
        run_federation(settings, tmp_path / "run", grid=LyingGrid(3))
