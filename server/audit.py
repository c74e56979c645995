"""The audit log of a deployment: starts and ends of runs, and the nodes that take part.

The environment variable COPRA_FL_AUDIT names its file, which the SuperLink of a deployment sets; without the variable
nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.supercore.logger import log

from copra_fl.config import Config
from copra_fl.deployment import registration
from copra_fl.files import append_line
from copra_fl.records import AuditedNode, AuditEvent
from copra_fl.records.audit import VARIABLE, now
from copra_fl.wire import Handshake
from copra_fl.wording import foreign


class AuditLog:
    """The events of the run in the folder `directory`; `run_id` is the id that nodes know."""

    def __init__(self, directory: Path, run_id: str) -> None:
        self._run, self._run_id = directory.name, run_id
        self._admitted: set[int] = set()
        self._reasons: set[str] = set()

    def begin(self, config: Config, source_digest: str, resumed: bool) -> None:
        """Record the start or the resume of the run."""
        self._write("resumed" if resumed else "started", config_digest=config.digest, source_digest=source_digest)

    def admit(self, nodes: Mapping[int, Handshake], config: Config) -> None:
        """Record those of `nodes` that are new; `config` is the configuration that they are sent."""
        home = os.environ.get(registration.VARIABLE)
        registered = registration.read_registered(Path(home)) if home else []
        known = {node.id: (node.name, node.key) for node in registered}
        for node in sorted(nodes.keys() - self._admitted):
            name, key = known.get(str(node), ("", ""))
            audited = AuditedNode(
                id=node, partition=nodes[node].partition, name=name, fingerprint=registration.fingerprint(key)
            )
            self._write("admitted", config_digest=config.digest, node=audited)
        self._admitted |= nodes.keys()

    def leave_out(self, reason: str) -> None:
        """Record that a node is left out; the same reason once."""
        if reason not in self._reasons:
            self._write("left out", reason=foreign(reason))
        self._reasons.add(reason)

    def finish(self, rounds: int) -> None:
        """Record the end of the run."""
        self._write("finished", rounds=rounds)

    def _write(self, event: str, **fields: Any) -> None:
        write(event, self._run, run_id=self._run_id, **fields)


def write(event: str, run: str, **fields: Any) -> None:
    """Append an event of the folder `run` to the log and flush it to the disk."""
    if path := os.environ.get(VARIABLE):
        record = AuditEvent.model_validate({"time": now(), "event": event, "run": run, **fields})
        append_line(Path(path), record.to_json())


@contextmanager
def stops_recorded(directory: Path) -> Iterator[None]:
    """Record an error inside the block as the reason why the run in `directory` has stopped."""
    try:
        yield
    except BaseException as error:
        try:
            write("stopped", directory.name, reason=foreign(str(error) or type(error).__name__))
        except OSError as problem:  # the disk may be full; the run's own error is the one that matters
            log(WARNING, "the audit log cannot be written: %s", problem)
        raise
