"""The request of one round: cohorts, inspected clients, and the values that training starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from copra_fl.adapters.state import Adapter


@dataclass(frozen=True)
class RoundRequest:
    """A request to the nodes to train or to evaluate in one round. Their replies are read with its help.

    Attributes:
        server_round: the round, from 1.
        cohorts: node -> its clients.
        num_wanted: number of clients whose replies are enough.
        inspected: clients whose own adapters the server needs; nodes may pool the others' updates.
        starts: client -> the tensors that it may send, with their values before the training; empty for an evaluation.
        has_control: whether clients also send the changes of their control variates.
        has_grams: whether clients also send Gram matrices.
        moments: names of the optimizer's moments that clients also send.
        ages: client -> age in rounds of the global adapter that it starts from.
        apart: clients that do not start from the newest global adapter.
        masked: the tensors in the masked vector that each node sends in place of all buffers, with their values before
            the training; empty without secure aggregation.
    """

    server_round: int
    cohorts: Mapping[int, Sequence[int]]
    num_wanted: int
    inspected: frozenset[int] = frozenset()
    starts: Mapping[int, Adapter] = field(default_factory=dict)
    has_control: bool = False
    has_grams: bool = False
    moments: tuple[str, ...] = ()
    ages: Mapping[int, int] = field(default_factory=dict)
    apart: frozenset[int] = frozenset()
    masked: Adapter = field(default_factory=dict)

    @property
    def is_masked(self) -> bool:
        """True if nodes send masked vectors (`server.secure_round`)."""
        return bool(self.masked)

    @property
    def clients(self) -> list[int]:
        """The clients of all nodes, sorted."""
        return sorted(client for cohort in self.cohorts.values() for client in cohort)

    def num_answered(self, replies: Iterable[Message]) -> int:
        """Return the number of clients on the nodes that sent `replies`."""
        nodes = {reply.metadata.src_node_id for reply in replies}
        return sum(len(cohort) for node, cohort in self.cohorts.items() if node in nodes)

    def enough(self, replies: Iterable[Message]) -> bool:
        """Return whether `replies` without an error cover as many clients as are required, so that the wait can end.

        Of masked vectors all are waited for.
        """
        if self.is_masked:
            return False
        return self.num_answered(reply for reply in replies if reply.has_content()) >= self.num_wanted
