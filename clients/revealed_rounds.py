"""The rounds in which a node has revealed shares, on its disk: it reveals again only for the same sum.

A server that asks for a round a second time with one node less, or with another vector of one node, would read the
difference of two sums. A run that was killed after the nodes were asked to unmask does the round again honestly, and
gets the same sum or none.

The file is written before the shares leave the node. Private runs are not in it: each sum of theirs has new noise, and
is charged (`server.privacy_budget`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from clients.client_state import run_folder
from copra_fl.files import DamagedFile, atomic_write
from copra_fl.records.record import DamagedRecord, Record
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.wording import listed


class RevealedRound(Record):
    """One line of the file.

    Attributes:
        round: the round.
        survivors: numbers of the nodes whose vectors are in the sum.
        vector: digest of this node's own vector, in hexadecimal digits.
    """

    round: int
    survivors: tuple[int, ...]
    vector: str


class RevealedRounds:
    """The rounds of `run` in which `node`, the node's number, has revealed shares.

    Raises DamagedFile for a damaged line.
    """

    def __init__(self, run: str, node: int) -> None:
        self._node, self._path = node, run_folder(run) / f"node-{node}-revealed.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        try:
            records = [RevealedRound.from_json(line) for line in lines]
        except DamagedRecord as damage:
            raise DamagedFile(self._path, str(damage)) from damage
        self._by_round = {record.round: record for record in records}

    def newest(self, rounds: Iterable[int]) -> int:
        """Return the newest of `rounds` in which shares were revealed; 0 without one."""
        return max((number for number in rounds if number in self._by_round), default=0)

    def check_vector(self, server_round: int, vector: bytes) -> None:
        """Raise SecureAggregationError if shares of `server_round` were revealed with another vector.

        `vector` is the digest of the vector without masks.
        """
        earlier = self._by_round.get(server_round)
        if earlier and earlier.vector != vector.hex():
            raise SecureAggregationError(
                f"node {self._node} has revealed its shares of round {server_round} already, with another vector: its "
                "clients, its software, its data or what the server sends have changed since. Undo the change and "
                "--resume, or start the run anew with --overwrite"
            )

    def check_nodes(self, server_round: int, nodes: Collection[int]) -> None:
        """Raise SecureAggregationError if shares of `server_round` were revealed for a sum with others than `nodes`."""
        self.check_present(server_round, nodes)
        earlier = self._by_round.get(server_round)
        if earlier and (more := set(nodes) - set(earlier.survivors)):
            raise SecureAggregationError(f"{self._sum_of(earlier)}: node {listed(sorted(more))} was not in it")

    def check_present(self, server_round: int, nodes: Collection[int]) -> None:
        """Raise SecureAggregationError if a node of the sum that shares were revealed for is not among `nodes`."""
        earlier = self._by_round.get(server_round)
        if earlier and (absent := set(earlier.survivors) - set(nodes)):
            raise SecureAggregationError(f"{self._sum_of(earlier)}: node {listed(sorted(absent))} is missing now")

    def add(self, server_round: int, survivors: Iterable[int], vector: bytes) -> None:
        """Write a round to the disk, before its shares leave the node."""
        record = RevealedRound(round=server_round, survivors=tuple(sorted(survivors)), vector=vector.hex())
        if self._by_round.get(server_round) != record:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._by_round[server_round] = record
            atomic_write(self._path, "".join(one.to_json() + "\n" for one in self._by_round.values()), mode=0o600)

    def _sum_of(self, earlier: RevealedRound) -> str:
        return (
            f"node {self._node} has revealed its shares of round {earlier.round} already, for the sum of nodes "
            f"{listed(earlier.survivors)}, and reveals them again for the same sum only"
        )
