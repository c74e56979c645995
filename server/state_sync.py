"""Synchronization of the server's state with the nodes: the whole state, or what changed since a node's cached one.

With most rules the whole adapter changes in every round. If a part of it does not change, or W0 does, nodes cache what
they received (`Rule.nodes_cache_state`), and a node that answered the last round gets only that round's changes. A node
that failed or joined late, and every node after a resume, gets the whole state.
"""

from __future__ import annotations

from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, part_of, parts
from copra_fl.aggregation import client_ranks
from copra_fl.aggregation.ranks import cut
from copra_fl.training.plan import Plan
from server.run_context import RunContext


class StateSync:
    """Knows which state each node has cached, and packs messages accordingly.

    Attributes:
        residual: what the last round added to W0.
    """

    def __init__(self, run: RunContext) -> None:
        self.residual: Adapter = {}
        self._run = run
        self._cached: dict[int, int] = {}
        self._sent: dict[int, int] = {}

    def pack(self, plan: Plan, state: ServerState, number: int, node: int) -> wire.RecordDict:
        """Return the message with `plan` and `state` for `node`; `number` of rounds led to `state`.

        If the plan's round is a later one, the message is for training: the adapter is cut to the cohort's largest rank
        and the control variate is included.
        """
        since, all_parts = self._cached.get(node, -1), {part_of(name) for name in state.adapter}
        sent_parts, residual = all_parts, state.residual
        if since == number:
            sent_parts, residual = set(), {}
        elif since >= 0 and since == number - 1:
            sent_parts, residual = all_parts & self._run.rule.changes(number), self.residual
        else:
            since = -1
        is_training = number < plan.server_round
        rank = self._largest_rank(plan.clients) if is_training else self._run.config.model.rank
        self._sent[node] = number
        return wire.pack_plan(
            plan,
            wire.StateDelta(self._run.run, number, since, tuple(sorted(sent_parts)), rank),
            wire.Payload(cut(parts(state.adapter, sent_parts), rank), residual, state.control if is_training else {}),
        )

    def acknowledge(self, node: int) -> None:
        """Record that `node` has answered, so it has cached what was sent to it."""
        if self._run.rule.nodes_cache_state:
            self._cached[node] = self._sent[node]

    def forget(self, node: int) -> None:
        """Record that the cached state of `node` is unknown."""
        self._cached.pop(node, None)

    def _largest_rank(self, clients: tuple[int, ...]) -> int:
        ranks = client_ranks(self._run.config, self._run.config.data.num_clients)
        return max(ranks[client] for client in clients)
