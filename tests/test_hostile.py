"""A node that sends anything but an honest update: refused, named in the journal, never averaged.

The oracle of each case is a run in which that client just fails in that round: the adapters are bitwise the same.
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
from tests.support.federations import final_adapter
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings

Meddle = Callable[[RecordDict, RecordDict | None], object]
BAD_NODE, BAD_ROUND = 101, 2


class HostileGrid(LocalGrid):
    """One of three nodes replaces its reply to training in round 2; `meddle` gets it and the one of round 1."""

    def __init__(self, meddle: Meddle | None, message_type: str = "train") -> None:
        super().__init__(3)
        self.meddle, self.message_type, self.earlier = meddle, message_type, None

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        about = message.metadata
        if about.dst_node_id != BAD_NODE or about.message_type != self.message_type:
            return reply
        if message.content["plan"]["server-round"] < BAD_ROUND:
            self.earlier = reply.content
            return reply
        if self.meddle is None:
            return Message(Error(code=0, reason="gone"), reply_to=message)
        self.meddle(reply.content, self.earlier)
        return reply


@pytest.fixture(scope="module")
def settings(tiny: Settings) -> Settings:
    flat = {"num-clients": 3, "failures": "tolerant", "max-update-norm": 5.0, "path-pairs": 0, "merge-gap-clients": 0}
    return tiny | flat


@pytest.fixture(scope="module")
def without(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, torch.Tensor]]:
    """The adapter where the client fails in round 2."""
    yield final_adapter(run_federation(settings, tmp_path_factory.mktemp("without"), grid=HostileGrid(None)))


def change(by: Callable[[torch.Tensor], torch.Tensor]) -> Meddle:
    """The client's values, changed."""

    def meddle(content: RecordDict, earlier: RecordDict | None) -> None:
        values = wire.unpack_arrays(content, "adapters")["values"]
        content["adapters"] = ArrayRecord(torch_state_dict={"values": by(values)})

    return meddle


def bomb(content: RecordDict, earlier: RecordDict | None) -> None:
    """100 bytes that say they are 40 terabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    content["adapters"] = ArrayRecord({"values": Array("float32", (10**13,), "numpy.ndarray", header.getvalue())})


def replay(content: RecordDict, earlier: RecordDict | None) -> None:
    """All of what was sent in round 1."""
    assert earlier is not None
    for name in list(content):
        del content[name]
    for name, record in earlier.items():
        content[name] = record


def of_another_run(content: RecordDict, earlier: RecordDict | None) -> None:
    content["echo"]["run"] = "0123"


def stuffed(content: RecordDict, earlier: RecordDict | None) -> None:
    content["more"] = ArrayRecord({"values": Array(np.zeros(10**6, np.float32))})


def scalars(**changes: float | list[float]) -> Meddle:
    """Other scalars in place of the one client's own."""

    def meddle(content: RecordDict, earlier: RecordDict | None) -> None:
        (record,) = content.metric_records.values()
        for name, value in changes.items():
            record[name.replace("_", "-")] = value

    return meddle


CASES: dict[str, tuple[Meddle, str]] = {
    "nan": (change(lambda v: torch.full_like(v, torch.nan)), "has values that are not finite"),
    "one-inf": (change(lambda v: torch.cat([v[:-1], torch.tensor([torch.inf])])), "has values that are not finite"),
    "short": (change(lambda v: v[:-1]), "values should be"),
    "square": (change(lambda v: v[:4].view(2, 2)), "values should be"),
    "double": (change(torch.Tensor.double), "values should be"),
    "giant": (change(lambda v: v * 1e4), "client 1 has moved by .* more than max-update-norm = 5"),
    "longest": (change(lambda v: torch.full_like(v, 3e38)), "more than max-update-norm = 5"),
    "bomb": (bomb, ""),
    "count": (scalars(num_examples=10**9), "claims 1000000000 examples; at the start it had"),
    "negative": (scalars(num_examples=-3), "claims -3 examples"),
    "steps": (scalars(active_steps=[10**9] * 3), "claims 1000000000 active steps of a layer; a round has 3"),
    "loss": (scalars(loss=float("nan")), "a training loss of nan"),
    "metric": (scalars(examples=1.0), "reports examples; known are"),
    "replay": (replay, "it answers round 1 of run .*, not round 2"),
    "other-run": (of_another_run, "it answers round 2 of run 0123, not round 2"),
    "stuffed": (stuffed, "bytes; a reply to this message has at most"),
    "no-record": (lambda content, earlier: content.pop("metrics-1"), "the metrics of client 1 are missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_honest_update_is_refused_and_not_averaged(
    settings: Settings, without: dict[str, torch.Tensor], case: str, tmp_path: Path
) -> None:
    meddle, reason = CASES[case]
    directory = run_federation(settings, tmp_path / "run", grid=HostileGrid(meddle))
    first, second = (json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines())
    assert [client["client"] for client in first["clients"]] == [0, 1, 2] and not first["missing"]
    assert [client["client"] for client in second["clients"]] == [0, 2]
    (missing,) = second["missing"]
    assert missing["client"] == 1
    assert missing["reason"].startswith("its node's reply was rejected: ")
    assert re.search(reason, missing["reason"])
    got = final_adapter(directory)
    assert all(torch.equal(got[name], without[name]) for name in without)


def test_an_honest_run_is_not_refused_and_is_another(
    settings: Settings, without: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The cases above can fail: with nothing wrong nobody is missing, and the adapter is not the oracle's."""
    directory = run_federation(settings, tmp_path / "run", grid=HostileGrid(lambda content, earlier: None))
    rows = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows] == [[], []]
    assert not torch.equal(final_adapter(directory)["head.weight"], without["head.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accuracy": 1.5}, "an accuracy of 1.5"),
        ({"loss": float("inf")}, "a loss of inf"),
        ({"examples": 10**6}, "claims 1000000 validation examples"),
    ],
)
def test_an_evaluation_that_cannot_be_is_left_out(
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
def test_a_hello_that_cannot_be_stops_the_run_and_names_its_node(
    settings: Settings, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    class Lying(LocalGrid):
        def answer(self, message: Message) -> Message:
            reply = super().answer(message)
            if message.metadata.dst_node_id == BAD_NODE:
                reply.content["handshake"] = ConfigRecord({**reply.content["handshake"], **changes})
            return reply

    with pytest.raises(FederationError, match=reason):
        run_federation(settings, tmp_path / "run", grid=Lying(3))
