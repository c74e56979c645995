"""The sums that a run has asked its nodes to unmask: `unmaskings.jsonl` in its folder.

A round that was interrupted between that question and its checkpoint is done again. The nodes then reveal shares for
the same sum only (`clients.revealed_rounds`), so the round needs the same nodes, and no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from copra_fl.files import atomic_write
from copra_fl.records.record import Record


class Unmasking(Record):
    """One line of the file: the round, and the numbers of the nodes whose vectors are in the sum."""

    round: int
    nodes: tuple[int, ...]


class Unmaskings:
    """The sums that the run in `directory` has asked for."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "unmaskings.jsonl"

    def nodes(self, server_round: int) -> tuple[int, ...]:
        """Return the nodes of the sum of `server_round`; none if it was not asked for."""
        return next((unmasking.nodes for unmasking in self._read() if unmasking.round == server_round), ())

    def add(self, server_round: int, nodes: Iterable[int]) -> None:
        """Write the sum of a round to the disk, before the nodes are asked to unmask it."""
        others = [unmasking for unmasking in self._read() if unmasking.round != server_round]
        asked = [*others, Unmasking(round=server_round, nodes=tuple(sorted(nodes)))]
        atomic_write(self._path, "".join(unmasking.to_json() + "\n" for unmasking in asked))

    def _read(self) -> list[Unmasking]:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        return list(map(Unmasking.from_json, lines))
