"""What a run leaves behind, written so that a kill at any moment loses at most one round.

    config.toml           everything needed to run it again
    provenance.json       versions, source digest, seed, assets, machine
    checkpoints/          the server's state after each round, atomically, with the round's journal line
    journal.jsonl         a line a round
    adapter/              the final adapter in PEFT's format
    summary.json          the run's last word, once it is finished

The checkpoint is written first and carries its own journal line: on resume the journal is
made to agree with the newest checkpoint. Random streams need no saving, they are derived
from copra_fl.files import atomic_write
from copra_fl.files import atomic_write
from seed and round.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from copra_fl.adapters.server_state import State
from copra_fl.adapters.state import load_checkpoint, save_checkpoint
from copra_fl.files import atomic_write

Row = dict[str, Any]


class Journal:
    """The journal and checkpoints of the run in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._checkpoints = directory / "checkpoints"
        self._journal = directory / "journal.jsonl"
        self.rows: list[Row] = []

    @property
    def finished(self) -> bool:
        return (self.directory / "summary.json").exists()

    @property
    def begun(self) -> bool:
        return self._checkpoints.exists()

    @property
    def run(self) -> str:
        """The run's id, the same after a resume: what nodes keep of their clients goes by it."""
        path = self.directory / "provenance.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return known.get("run", uuid.uuid4().hex)

    def resume(self) -> State | None:
        """The state in the newest checkpoint, None before the first; fills `rows` up to its round."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        newest = max(self._checkpoints.glob("round-*.safetensors"), default=None)
        if newest is None:
            self._journal.unlink(missing_ok=True)
            return None
        tensors, metadata = load_checkpoint(newest)
        last = json.loads(metadata["row"])
        earlier = self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else []
        rows = [json.loads(line) for line in earlier if line.endswith("}")]
        self.rows = [row for row in rows if row["round"] < last["round"]] + [last]
        atomic_write(self._journal, "".join(json.dumps(row) + "\n" for row in self.rows))
        return State.from_tensors(tensors)

    def record(self, row: Row, state: State) -> None:
        """A finished round: its checkpoint, then its journal line."""
        path = self._checkpoints / f"round-{row['round']:05d}.safetensors"
        save_checkpoint(path, state.to_tensors(), {"row": json.dumps(row)})
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def add_provenance(self, origin: dict[str, Any]) -> None:
        """Write ``provenance.json``; where a run resumes, `origin` is added to its ``resumes``."""
        path = self.directory / "provenance.json"
        if path.exists():
            first = json.loads(path.read_text(encoding="utf-8"))
            origin = first | {"resumes": [*first.get("resumes", []), origin]}
        self.write_json(path.name, origin)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        atomic_write(self.directory / name, json.dumps(content, indent=2) + "\n")
