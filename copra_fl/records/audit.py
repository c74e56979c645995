"""Records of the audit logs: who submitted what, when, and which nodes took part; what a node was asked to do.

DIR/audit.jsonl             `AuditEvent`: submissions, written by `copra-fl deploy run`
DIR/runs/audit.jsonl        `AuditEvent`: everything else, written by the server app
CLIENT/state/audit/         `NodeRecord`: the messages of one node, written by the node
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from copra_fl.records.record import Record, RecordError

#: environment variable of the server app: the file that it appends its events to
VARIABLE = "COPRA_FL_AUDIT"

Line = TypeVar("Line", bound=Record)
#: kinds of messages to a node; the last four are steps of secure aggregation (`copra_fl.secure_wire`)
MessageKind = Literal["handshake", "train", "evaluate", "keys", "shares", "survivors", "unmask"]


def now() -> str:
    """Return the time of a new record: UTC, to the millisecond; as texts such times are in order."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class AuditedNode(Record):
    """A node that takes part in a run.

    Attributes:
        id: Flower's.
        partition: its partition-id.
        name: name of its key file on the server; empty for a node without a registered key.
        fingerprint: of its public key, as ``ssh-keygen -l`` prints it; empty likewise.
    """

    id: int
    partition: int
    name: str = ""
    fingerprint: str = ""


class AuditEvent(Record):
    """One line of a deployment's ``audit.jsonl``.

    Attributes:
        time: UTC.
        event: submitted: by `copra-fl deploy run`; started, resumed, finished, stopped: the run, in the server app;
            admitted, left out: a node. A server app that is killed writes no ``stopped``.
        run: name of the run's folder.
        run_id: id under which nodes store their states, the same after a resume.
        config_digest: `Config.digest`; of ``admitted``: of the configuration that is sent to the node, in which the
            number of clients, labels and dtype are resolved.
        source_digest: `provenance.library_digest` of the server app.
        user, host, command: of a submission.
        node: of ``admitted``.
        rounds: finished rounds, of ``finished``.
        reason: of ``left out`` and ``stopped``.
    """

    time: str
    event: Literal["submitted", "started", "resumed", "admitted", "left out", "finished", "stopped"]
    run: str
    run_id: str = ""
    config_digest: str = ""
    source_digest: str = ""
    user: str = ""
    host: str = ""
    command: str = ""
    node: AuditedNode | None = None
    rounds: int | None = None
    reason: str = ""


class NodeRecord(Record):
    """One message to a node, in the node's own audit log.

    Attributes:
        time: UTC, of the reply.
        kind: of the message.
        flower_run: Flower's id of the run.
        run: id of the run (`AuditEvent.run_id`); empty at the handshake, as are `round` and `clients`.
        config_digest: `Config.digest` of the configuration in the message; empty in a step of secure aggregation, as
            are `clients` and `examples`: its message has neither.
        examples: training examples of the clients together; at the handshake of all that the node can host.
        decision: accepted: the node has replied; rejected: not, because of its policy or its configuration; failed:
            an error in the work.
        reason: of a decision other than accepted.
        bytes_down, bytes_up: contents of the message and of the reply: arrays, metrics, and all that is of secure
            aggregation.
        total_rounds: accepted training messages in all runs, this one included.
        total_bytes: contents of all messages and replies in all runs, likewise.
    """

    time: str
    kind: MessageKind
    flower_run: int
    config_digest: str
    run: str = ""
    round: int = 0
    clients: tuple[int, ...] = ()
    examples: int = 0
    decision: Literal["accepted", "rejected", "failed"] = "accepted"
    reason: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    total_rounds: int = 0
    total_bytes: int = 0


def read_records(
    kind: type[Line], paths: Iterable[Path], read: Callable[[Path], bytes] = Path.read_bytes
) -> tuple[list[Line], int]:
    """Return the records in JSON-lines files, and the number of lines that are none: a power failure tears a line.

    A file for which `read` raises OSError counts as an empty one.
    """
    records, num_damaged = [], 0
    for path in paths:
        try:
            text = read(path).decode(errors="replace")
        except OSError:
            continue
        for line in filter(None, text.split("\n")):
            try:
                records.append(kind.from_json(line))
            except RecordError:
                num_damaged += 1
    return records, num_damaged
