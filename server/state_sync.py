"""Synchronization of the server's state with the nodes: the whole state, or what changed since a node's cached one.

With most settings the whole adapter changes in every round. If a part of it may not change, or W0 changes, nodes cache
what they received (`training.plan.caches_state`), and a node that answered the last round gets only the tensors that
this round has changed. A node that failed or joined late, and every node after a resume, gets the whole state.

In every round a node also gets the older global adapters that its clients need (`aggregation.starts`), without the
tensors in which they equal the newest.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, parts
from copra_fl.aggregation import client_ranks
from copra_fl.aggregation.ranks import cut
from copra_fl.aggregation.starts import older_ages
from copra_fl.training.plan import Plan, caches_state
from server.run_context import RunContext


class StateSync:
    """Knows which state each node has cached, and packs messages accordingly."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._changed: set[str] = set()
        self._residual: Adapter = {}
        self._cached: dict[int, tuple[int, int]] = {}  # node -> number of the state, rank of its tensors
        self._sent: dict[int, tuple[int, int]] = {}

    def advance(self, before: ServerState, after: ServerState, residual: Adapter) -> None:
        """Record what a round has changed: the state, and W0 by `residual`."""
        old, new = before.adapter, after.adapter
        self._changed = {name for name, tensor in new.items() if not torch.equal(old[name], tensor)}
        self._residual = residual

    def pack(self, plan: Plan, state: ServerState, control: Adapter, number: int, node: int) -> wire.RecordDict:
        """Return the message with `plan` and `state` for `node`; `number` of rounds led to `state`.

        If the plan's round is a later one, the message is for training: the adapter is cut to the cohort's largest rank
        and the global control variate `control` and the shared moments of the optimizers are included, and the older
        adapters that its clients need.
        """
        is_training = number < plan.server_round
        rank = self._largest_rank(plan.clients) if is_training else self._run.config.model.rank
        since, sent, residual = self._missing(state, number, rank, node)
        _, cached_rank = self._cached.get(node, (-1, rank))
        shared_rank = rank if since < 0 or sent == state.adapter.keys() else min(rank, cached_rank)
        self._sent[node] = number, shared_rank if sent else cached_rank
        older = older_ages(self._run.config, number, plan.clients) if is_training else ()
        earlier = {age: state.of_age(age) for age in older}
        changed = {
            name
            for old in earlier.values()
            for name, tensor in old.items()
            if not torch.equal(tensor, state.adapter[name])
        }
        return wire.pack_plan(
            plan,
            wire.StateDelta(
                self._run.run, number, since, indices(state.adapter, sent), rank, indices(state.adapter, changed), older
            ),
            wire.Payload(
                cut(chosen(state.adapter, sent), rank),
                residual,
                control if is_training else {},
                {kind: parts(t, plan.trained_parts) for kind, t in state.optimizer.items()} if is_training else {},
                {age: cut(chosen(old, changed), rank) for age, old in earlier.items()},
            ),
        )

    def _missing(self, state: ServerState, number: int, rank: int, node: int) -> tuple[int, set[str], Adapter]:
        """Return the number of the state that `node` adds to, the tensors that it lacks up to `rank`, the residual."""
        since, cached_rank = self._cached.get(node, (-1, rank))
        everything = set(state.adapter)
        if since == number and rank <= cached_rank:
            return since, set(), {}
        if since >= 0 and since == number - 1 and (rank <= cached_rank or self._changed == everything):
            return since, self._changed, self._residual
        return -1, everything, state.residual

    def acknowledge(self, node: int) -> None:
        """Record that `node` has answered, so it has cached what was sent to it."""
        if caches_state(self._run.config):
            self._cached[node] = self._sent[node]

    def forget(self, node: int) -> None:
        """Record that the cached state of `node` is unknown."""
        self._cached.pop(node, None)

    def _largest_rank(self, clients: tuple[int, ...]) -> int:
        ranks = client_ranks(self._run.config, self._run.config.data.num_clients)
        return max((ranks[client] for client in clients), default=self._run.config.model.rank)


def indices(adapter: Adapter, names: Container[str]) -> tuple[int, ...]:
    """Return the places of the tensors `names` in the alphabetical order of all."""
    return tuple(index for index, name in enumerate(sorted(adapter)) if name in names)


def chosen(adapter: Adapter, names: Container[str]) -> Adapter:
    """Return the tensors `names` of `adapter`."""
    return {name: tensor for name, tensor in adapter.items() if name in names}
