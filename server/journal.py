"""The files of a run, written so that a kill or a power failure at any moment loses at most one round.

    config.toml           the configuration, complete
    provenance.json       versions, source digest, machine, assets: of the start and of each resume
    checkpoints/          the server's state after each round, with the round's journal line and the run's id
    journal.jsonl         one line per round (`records.RoundRecord`)
    adapter/              the final adapter in PEFT's format
    summary.json          results of the finished run (`records.RunSummary`)

A round's checkpoint is written first. A resume goes on from the newest whole one, and takes the lines that
journal.jsonl lacks from the checkpoints; it never goes on without the line of an earlier round. Random streams need no
saving, because they are derived from seed and round.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import cached_property
from logging import WARNING
from pathlib import Path

from flwr.supercore.logger import log

from copra_fl.adapters.server_state import ServerState
from copra_fl.events import emit
from copra_fl.files import DamagedFile, append_line, atomic_write
from copra_fl.records import DamagedRecord, Origin, Provenance, Record, RecordError, RoundRecord, RunSummary, read_lines

#: texts of a checkpoint: its journal line, the run's id
RECORD, RUN = "record", "run"


class Journal:
    """Writer of the run folder `directory`.

    Attributes:
        records: the finished rounds, without their clients, which would fill the memory in a long run; filled by
            `resume`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: list[RoundRecord] = []
        self._checkpoints = directory / "checkpoints"
        self._journal = directory / "journal.jsonl"
        self._provenance = directory / "provenance.json"

    @property
    def finished(self) -> bool:
        """True if the run has a summary."""
        return (self.directory / "summary.json").exists()

    @property
    def begun(self) -> bool:
        """True if a run has started in the folder."""
        return self._checkpoints.exists()

    @cached_property
    def run(self) -> str:
        """Id of the run, the same after a resume: nodes store their clients' states under it."""
        provenance = self._read_provenance()
        if provenance is None:
            texts = next((texts for _, texts in self._whole_checkpoints()), {})
            return texts.get(RUN) or uuid.uuid4().hex
        return provenance.run

    def resume(self) -> ServerState | None:
        """Return the state in the newest whole checkpoint and read `records` up to its round; None at the start.

        Damaged files are named in the log. Raises RecordError for a run folder that another version of copra-fl wrote,
        and DamagedFile if there are checkpoints and the run cannot go on from any of them.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        if not self._paths():
            self._journal.unlink(missing_ok=True)
            return None
        try:
            state = self._state_with_records()
        except RecordError as error:
            raise self.other_version() from error
        atomic_write(self._journal, "".join(record.to_json() + "\n" for record in self.records))
        self.records = list(map(without_clients, self.records))
        return state

    def record(self, record: RoundRecord, state: ServerState, keep: int = 0) -> None:
        """Write a finished round: its checkpoint, then its journal line. All but the newest `keep` checkpoints go.

        `keep` 0: all stay.
        """
        state.save(self._path(record.round), {RECORD: record.to_json(), RUN: self.run})
        append_line(self._journal, record.to_json())
        self.records.append(without_clients(record))
        for path in self._paths()[:-keep] if keep else []:
            path.unlink()

    def read(self) -> list[RoundRecord]:
        """Return the finished rounds with their clients. Raises DamagedFile if the files lack one."""
        lines = {record.round: record for record in self._journal_lines()}
        stored = [lines.get(record.round) or self._line_of(record.round) for record in self.records]
        records = [record for record in stored if record is not None]
        if len(records) < len(stored):
            raise DamagedFile(self._journal, "rounds are missing, and their checkpoints too")
        return records

    def add_origin(self, seed: int, origin: Origin) -> None:
        """Write ``provenance.json`` at the start of a run, or add `origin` as a resume."""
        earlier = self._read_provenance()
        if earlier is None:
            provenance = Provenance(run=self.run, seed=seed, start=origin)
        else:
            provenance = earlier.model_copy(update={"resumes": (*earlier.resumes, origin)})
        self._write(self._provenance, provenance)

    def write_summary(self, summary: RunSummary) -> None:
        """Write ``summary.json``, which marks the run as finished."""
        self._write(self.directory / "summary.json", summary)

    def _state_with_records(self) -> ServerState:
        """Return the newest state that can be continued, and read the records up to it."""
        lines = {record.round: record for record in self._journal_lines()}
        for state, texts in self._whole_checkpoints():
            last = RoundRecord.from_json(texts.get(RECORD, "{}"))
            records = [lines.get(number) or self._line_of(number) for number in range(1, last.round)]
            known = [record for record in records if record is not None]
            if len(known) == len(records):
                self.records = [*known, last]
                return state
            lacking = next(number for number, record in enumerate(records, start=1) if record is None)
            warn(
                f"{self._journal} lacks round {lacking}, and there is no whole checkpoint of it: an older one is tried"
            )
        raise DamagedFile(self._checkpoints, "the run cannot go on from any checkpoint; start it anew with --overwrite")

    def _whole_checkpoints(self) -> Iterator[tuple[ServerState, dict[str, str]]]:
        """Yield the checkpoints that are not damaged, the newest first."""
        for path in reversed(self._paths()):
            try:
                yield ServerState.load(path)
            except DamagedFile as damage:
                warn(f"{damage}; the checkpoint before it is tried")

    def _journal_lines(self) -> list[RoundRecord]:
        if not self._journal.exists():
            return []
        records, damaged = read_lines(self._journal)
        if damaged:
            warn(f"{self._journal}: damaged lines {', '.join(map(str, damaged))}; the checkpoints have them too")
        return records

    def _line_of(self, number: int) -> RoundRecord | None:
        """Return the journal line in the checkpoint of a round; None without a whole checkpoint."""
        try:
            _, texts = ServerState.load(self._path(number))
        except (FileNotFoundError, DamagedFile):
            return None
        return RoundRecord.from_json(texts.get(RECORD, "{}"))

    def _paths(self) -> list[Path]:
        return sorted(self._checkpoints.glob("round-*.safetensors"))

    def _path(self, number: int) -> Path:
        return self._checkpoints / f"round-{number:05d}.safetensors"

    def _read_provenance(self) -> Provenance | None:
        """Return the provenance; None without a file, or if it is damaged."""
        if not self._provenance.exists():
            return None
        try:
            return Provenance.from_json(self._provenance.read_bytes())
        except DamagedRecord as damage:
            warn(f"{self._provenance} is damaged ({damage}); it is written again")
            return None
        except RecordError as error:
            raise self.other_version() from error

    def other_version(self) -> RecordError:
        """Return the error for a run folder that another version of copra-fl wrote."""
        return RecordError(
            f"{self.directory} was written by another version of copra-fl and cannot be resumed; start the run anew in "
            "another folder, or resume it with the version that provenance.json names"
        )

    @staticmethod
    def _write(path: Path, record: Record) -> None:
        atomic_write(path, record.to_json(indent=2) + "\n")


def without_clients(record: RoundRecord) -> RoundRecord:
    """Return the record of a round without its clients."""
    return record.model_copy(update={"clients": ()})


def warn(text: str) -> None:
    """Write `text` to the log and to the command line."""
    log(WARNING, "%s", text)
    emit("note", text=text)
