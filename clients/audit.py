"""The audit log of a node: one line for each message, in files of limited size.

    FOLDER/audit.jsonl        the newest lines (`records.NodeRecord`)
    FOLDER/audit.1.jsonl      older ones, up to audit.4.jsonl

Each line has the totals of all lines before it, so that what a policy counts survives the removal of old files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from copra_fl.files import append_line, flush_folder
from copra_fl.records import NodeRecord, RecordError

#: size from which a file is closed, and number of closed files that are kept
MAX_BYTES, NUM_KEPT = 1_000_000, 4


class AuditLog:
    """The audit log in `folder`; an empty string is no folder, and nothing is written."""

    def __init__(self, folder: str) -> None:
        self._is_kept, self._folder = bool(folder), Path(folder)

    def counted(self, record: NodeRecord) -> NodeRecord:
        """Return `record` with the totals up to and including it."""
        newest = self._newest()
        is_round = record.kind == "train" and record.decision == "accepted"
        totals = {
            "total_rounds": is_round + (newest.total_rounds if newest else 0),
            "total_bytes": record.bytes_down + record.bytes_up + (newest.total_bytes if newest else 0),
        }
        return record.model_copy(update=totals)

    def append(self, record: NodeRecord, check: Callable[[NodeRecord], None] = lambda counted: None) -> None:
        """Write `record` with its totals to the disk, unless `check` of it raises an error.

        Messages that are answered at the same time are counted one after another.
        """
        if not self._is_kept:
            check(self.counted(record))
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(self._folder / ".lock"):
            counted = self.counted(record)
            check(counted)
            path = self._file(0)
            if path.exists() and path.stat().st_size >= MAX_BYTES:
                self._rotate()
            append_line(path, counted.to_json())

    def _rotate(self) -> None:
        for number in range(NUM_KEPT, 0, -1):
            if (earlier := self._file(number - 1)).exists():
                earlier.replace(self._file(number))
        flush_folder(self._folder)

    def _newest(self) -> NodeRecord | None:
        """Return the newest whole line; None without one."""
        for number in range(NUM_KEPT + 1) if self._is_kept else ():
            path = self._file(number)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            for line in reversed(lines):
                with suppress(RecordError):
                    return NodeRecord.from_json(line)
        return None

    def _file(self, number: int) -> Path:
        return self._folder / (f"audit.{number}.jsonl" if number else "audit.jsonl")
