"""The adapters from which the clients of a round start, where these are not all the newest global adapter.

    start = "own"    a client that trains from the initial state draws its own A. B = 0, so all clients still start from
                     the same function. The first round averages factors that have started apart; later rounds start
                     from that average
    stale-clients    this share of the clients, drawn once, trains from the global adapter that is `staleness` rounds
                     older than the newest, or from the initial one before there are as many rounds. The resulting
                     adapter is averaged as it is, like those of all other clients

Nodes and server derive the same starts: updates travel as differences from them, and the server completes an update by
the tensors that its client has not trained.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from copra_fl.adapters.state import Adapter, draw, parts
from copra_fl.aggregation.ranks import at_client_ranks
from copra_fl.config import Config
from copra_fl.seeding import derive, generator


def stale_clients(config: Config) -> set[int]:
    """Return the clients that work from an old global adapter: at least one if ``stale-clients`` is above 0."""
    share, number = config.federation.stale_clients, config.data.num_clients
    if not share:
        return set()
    order = generator(config.federation.seed, "stale-clients").permutation(number)
    return set(order[: max(1, round(share * number))].tolist())


def ages(config: Config, number: int, clients: Iterable[int]) -> dict[int, int]:
    """Return the age in rounds of the global adapter that each client starts from; 0: the newest.

    `number` of rounds led to the newest global adapter.
    """
    stale = stale_clients(config)
    return {client: min(config.federation.staleness, number) if client in stale else 0 for client in clients}


def has_own_start(config: Config, number: int) -> bool:
    """Return whether a client draws its own A where it starts from state `number`."""
    return config.federation.start == "own" and number == 0


def own_start(config: Config, initial: Adapter, client: int) -> Adapter:
    """Return the `initial` global adapter with the client's own A, from its stream ``start``, and B = 0."""
    stream = torch.Generator().manual_seed(derive(config.federation.seed, "start", client))
    return initial | draw(dict(sorted(parts(initial, "AB").items())), stream)


def client_starts(
    config: Config, number: int, newest: Adapter, old: Adapter, clients: Iterable[int]
) -> dict[int, Adapter]:
    """Return the start of each client, cut to the client's rank and for its scaling.

    Args:
        config: of the run.
        number: rounds that led to `newest`.
        newest: the newest global adapter.
        old: the global adapter that stale clients start from; ignored without them.
        clients: of the round.
    """
    starts = {}
    for client, age in ages(config, number, clients).items():
        start = old if age else newest
        starts[client] = own_start(config, start, client) if has_own_start(config, number - age) else start
    return at_client_ranks(config, starts)
