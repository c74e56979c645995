"""The files of a run, written so that a kill at any moment loses at most one round.

    config.toml           the configuration, complete
    provenance.json       versions, source digest, machine, assets: of the start and of each resume
    checkpoints/          the server's state after each round, with the round's journal line
    journal.jsonl         one line per round (`records.RoundRecord`)
    adapter/              the final adapter in PEFT's format
    summary.json          results of the finished run (`records.RunSummary`)

A round's checkpoint is written first and contains the round's journal line: a resume makes the journal agree with the
newest checkpoint. Random streams need no saving, because they are derived from seed and round.
"""

from __future__ import annotations

import uuid
from functools import cached_property
from pathlib import Path

from copra_fl.adapters.server_state import ServerState
from copra_fl.files import atomic_write
from copra_fl.records import Origin, Provenance, Record, RecordError, RoundRecord, RunSummary

#: key of the journal line in a checkpoint's metadata
RECORD = "record"


class Journal:
    """Writer of the run folder `directory`.

    Attributes:
        records: the finished rounds; filled by `resume`.
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
        return self._read_provenance().run if self._provenance.exists() else uuid.uuid4().hex

    def resume(self) -> ServerState | None:
        """Return the state in the newest checkpoint and read `records` up to its round; None without a checkpoint.

        Raises RecordError for a run folder that another version of copra-fl wrote.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        newest = max(self._checkpoints.glob("round-*.safetensors"), default=None)
        if newest is None:
            self._journal.unlink(missing_ok=True)
            return None
        state, metadata = ServerState.load(newest)
        try:
            last = RoundRecord.from_json(metadata.get(RECORD, "{}"))
            text = self._journal.read_text(encoding="utf-8") if self._journal.exists() else ""
            whole_lines = text[: text.rfind("\n") + 1].splitlines()  # a kill while writing leaves half a line
            self.records = [RoundRecord.from_json(line) for line in whole_lines[: last.round - 1]] + [last]
        except RecordError as error:
            raise self._other_version() from error
        atomic_write(self._journal, "".join(record.to_json() + "\n" for record in self.records))
        return state

    def record(self, record: RoundRecord, state: ServerState) -> None:
        """Write a finished round: its checkpoint, then its journal line."""
        state.save(self._checkpoints / f"round-{record.round:05d}.safetensors", {RECORD: record.to_json()})
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
        self.records.append(record)

    def add_origin(self, seed: int, origin: Origin) -> None:
        """Write ``provenance.json`` at the start of a run, or add `origin` as a resume."""
        if self._provenance.exists():
            earlier = self._read_provenance()
            provenance = earlier.model_copy(update={"resumes": (*earlier.resumes, origin)})
        else:
            provenance = Provenance(run=self.run, seed=seed, start=origin)
        self._write(self._provenance, provenance)

    def write_summary(self, summary: RunSummary) -> None:
        """Write ``summary.json``, which marks the run as finished."""
        self._write(self.directory / "summary.json", summary)

    def _read_provenance(self) -> Provenance:
        try:
            return Provenance.from_json(self._provenance.read_bytes())
        except RecordError as error:
            raise self._other_version() from error

    def _other_version(self) -> RecordError:
        return RecordError(
            f"{self.directory} was written by another version of copra-fl and cannot be resumed; start the run anew in "
            "another folder, or resume it with the version that provenance.json names"
        )

    @staticmethod
    def _write(path: Path, record: Record) -> None:
        atomic_write(path, record.to_json(indent=2) + "\n")
