"""Starts of the clients of a message: the server's state, with the state that each client has kept."""

from __future__ import annotations

from collections.abc import Mapping

from clients.client_state import ClientState
from copra_fl import wire
from copra_fl.adapters.state import Adapter
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.ranks import pad
from copra_fl.aggregation.scaffold import minus
from copra_fl.aggregation.starts import ages, client_anchors, client_starts
from copra_fl.config import Config
from copra_fl.training.plan import Plan, Start


def make_global_starts(plan: Plan, number: int, server_state: wire.Payload) -> dict[int, Adapter]:
    """Return the global adapter that each client starts from, cut to its rank.

    `number` of rounds led to the newest global adapter.
    """
    return client_starts(plan.config, number, _by_age(server_state), ages(plan.config, number, plan.clients))


def make_starts(
    plan: Plan,
    number: int,
    server_state: wire.Payload,
    global_starts: Mapping[int, Adapter],
    kept: Mapping[int, ClientState],
) -> dict[int, Start]:
    """Return the start of each client: its entry of `global_starts` with what it has `kept` from its last round."""
    older = client_anchors(plan.config, number, _by_age(server_state), plan.clients)
    anchors = [_local(plan.config, adapters, kept) for adapters in older]
    return {
        client: Start(
            adapter,
            minus(server_state.control, kept[client].control),
            server_state.optimizer or kept[client].optimizer,
            tuple(adapters[client] for adapters in anchors),
        )
        for client, adapter in _local(plan.config, global_starts, kept).items()
    }


def _by_age(server_state: wire.Payload) -> dict[int, Adapter]:
    return {0: server_state.adapter, **server_state.earlier}


def _local(config: Config, adapters: Mapping[int, Adapter], kept: Mapping[int, ClientState]) -> dict[int, Adapter]:
    """Return global adapters padded to the full rank, with each client's personal tensors."""
    local = dict(adapters)
    if config.aggregation.client_ranks:
        local = {client: pad(adapter, config.model.rank) for client, adapter in local.items()}
    if find_rule(config.aggregation.rule).personal:
        local = {client: adapter | kept[client].personal for client, adapter in local.items()}
    return local
