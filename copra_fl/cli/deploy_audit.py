"""`copra-fl deploy audit`: the audit log of a deployment, or of one client."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from copra_fl.cli.deploy import Directory
from copra_fl.cli.options import JsonOption
from copra_fl.console import plain_console
from copra_fl.deployment.container_files import read_plain
from copra_fl.deployment.layout import ClientLayout, DeploymentLayout
from copra_fl.wording import foreign

if TYPE_CHECKING:  # slow to import
    from copra_fl.records import AuditEvent, NodeRecord
    from copra_fl.records.audit import Line

#: characters of a digest in the table; --json has all of them, and the fields that are not in the table
NUM_SHOWN = 12


def audit(directory: Directory, as_json: JsonOption = False) -> None:
    """Show who submitted which run when, and which nodes took part. DIR/clients/client-0 shows the log of one node."""
    from copra_fl.records import AuditEvent, NodeRecord, read_records  # slow to import

    log = ClientLayout(directory.absolute()).audit
    if log.is_dir():
        records, num_damaged = read_records(NodeRecord, log.glob("audit*.jsonl"), read_without_links)
        show(sorted(records, key=lambda record: record.time), num_damaged, node_row, as_json)
    else:
        logs = DeploymentLayout.open(directory).audit_logs
        events, num_damaged = read_records(AuditEvent, logs, read_without_links)
        show(sorted(events, key=lambda event: event.time), num_damaged, event_row, as_json)


def read_without_links(path: Path) -> bytes:
    """Return the content of a file in a folder of a container, which can put links and pipes there."""
    return read_plain(path.parent, path.name)


def show(records: Sequence[Line], num_damaged: int, row: Callable[[Line], dict[str, str]], as_json: bool) -> None:
    """Print `records` as JSON or as a table, in which `row` gives heading -> cell of a record."""
    if num_damaged:
        plain_console(stderr=True).print(f"{num_damaged} damaged lines are left out", soft_wrap=True)
    if as_json:
        print(json.dumps([record.model_dump(mode="json") for record in records], indent=2))
        return
    from copra_fl.reporting.data_table import DataTable  # slow to import

    rows = [row(record) for record in records]
    if not rows:
        plain_console().print("the audit log is empty")
        return
    plain_console().print(DataTable(list(rows[0]), [[foreign(cell) for cell in cells.values()] for cells in rows]))


def event_row(event: AuditEvent) -> dict[str, str]:
    """Return the cells of an event; its details are those of its kind."""
    details = event.reason
    if event.event == "submitted":
        details = f"{event.user} on {event.host}: {event.command}"
    elif event.node:
        identity = f"{event.node.name} {event.node.fingerprint}" if event.node.name else "no registered key"
        details = f"node {event.node.id} (partition-id {event.node.partition}), {identity}"
    elif event.rounds is not None:
        details = f"{event.rounds} rounds"
    return {
        "time (UTC)": seconds(event.time),
        "run": event.run,
        "event": event.event,
        "details": details,
        "configuration": event.config_digest[:NUM_SHOWN],
    }


def node_row(record: NodeRecord) -> dict[str, str]:
    """Return the cells of a message to a node."""
    return {
        "time (UTC)": seconds(record.time),
        "message": f"{record.kind}, round {record.round}" if record.round else record.kind,
        "clients": ", ".join(map(str, record.clients)),
        "examples": str(record.examples),
        "decision": f"{record.decision}: {record.reason}" if record.reason else record.decision,
        "MB": f"{(record.bytes_down + record.bytes_up) / 1e6:.3f}",
    }


def seconds(time: str) -> str:
    """Return a record's time without milliseconds and zone."""
    return time[:19].replace("T", " ")
