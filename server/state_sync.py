"""What of the server's state goes to a node: all of it, or what has changed since the node heard last.

With most rules all of the adapter changes in every round. Where a part of it stays as it is, or W0 changes, nodes hold
on to what they got (`nodes_cache_state`), and a node that answered gets only the changes of the one round since. One
that failed, or came late, or any node after a resume, gets everything.
"""

from __future__ import annotations

from copra_fl import wire
from copra_fl.adapters.server_state import State
from copra_fl.adapters.state import Adapter, part_of, parts
from copra_fl.aggregation import client_ranks, find_rule
from copra_fl.aggregation.ranks import cut
from copra_fl.config import Config
from copra_fl.training.plan import Plan


class Deliveries:
    """
    Attributes:
        changed: what the last round has added to W0.
    """

    def __init__(self, config: Config, run: str) -> None:
        self._config, self._run = config, run
        self._rule = find_rule(config.aggregation.rule)
        self._holds: dict[int, int] = {}
        self._sent: dict[int, int] = {}
        self.changed: Adapter = {}

    def pack(self, plan: Plan, state: State, number: int, node: int) -> wire.RecordDict:
        """The message with `plan` for `node`; `number`: rounds behind `state`.

        Before the plan's round it is for training: cut to the cohort's largest rank, and with the control variate.
        """
        since, every = self._holds.get(node, -1), {part_of(name) for name in state.adapter}
        wanted, residual = every, state.residual
        if since == number:
            wanted, residual = set(), {}
        elif since >= 0 and since == number - 1:
            wanted, residual = every & self._rule.sends(number), self.changed
        else:
            since = -1
        is_training = number < plan.server_round
        rank = self._largest_rank(plan.clients) if is_training else self._config.model.rank
        self._sent[node] = number
        return wire.pack_plan(
            plan,
            wire.Delivery(self._run, number, since, tuple(sorted(wanted)), rank),
            wire.Content(cut(parts(state.adapter, wanted), rank), residual, state.control if is_training else {}),
        )

    def arrived(self, node: int) -> None:
        """`node` has answered, so it has what was sent to it."""
        if self._rule.nodes_cache_state:
            self._holds[node] = self._sent[node]

    def lost(self, node: int) -> None:
        """Whether `node` has what was sent to it is not known."""
        self._holds.pop(node, None)

    def _largest_rank(self, clients: tuple[int, ...]) -> int:
        ranks = client_ranks(self._config, self._config.data.num_clients)
        return max(ranks[client] for client in clients)
