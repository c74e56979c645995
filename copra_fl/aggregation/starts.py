"""The global adapters that the clients of a round need, where the newest is not enough.

    start = "own"    a client that trains from the initial state draws its own A. B = 0, so all clients still start from
                     the same function. The first round averages factors that have started apart; later rounds start
                     from that average
    stale-clients    this share of the clients, drawn once, trains from the global adapter that is `staleness` rounds
                     older than the newest, or from the initial one before there are as many rounds. The resulting
                     adapter is averaged as it is, like those of all other clients
    gucci-anchors    FedGuCci's loss (`training.points`) has this many of the newest global adapters as anchors

Nodes and server derive the same starts: updates travel as differences from them, and the server completes an update by
the tensors that its client has not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from copra_fl.adapters.state import Adapter, draw
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


def num_anchors(config: Config, number: int) -> int:
    """Return the number of FedGuCci's anchors for clients that start from state `number`, which is the first anchor."""
    settings = config.aggregation
    return min(settings.gucci_anchors, number + 1) if settings.gucci_beta else 1


def older_ages(config: Config, number: int, clients: Iterable[int]) -> tuple[int, ...]:
    """Return the ages of the older global adapters that `clients` need where `number` of rounds led to the newest."""
    needed = {*ages(config, number, clients).values(), *range(num_anchors(config, number))}
    return tuple(sorted(needed - {0}))


def num_earlier(config: Config) -> int:
    """Return the number of older global adapters that the server keeps."""
    federation = config.federation
    oldest_start = federation.staleness if federation.stale_clients else 0
    return max(oldest_start, num_anchors(config, federation.num_rounds) - 1)


def has_own_start(config: Config, number: int) -> bool:
    """Return whether a client draws its own A where it starts from state `number`."""
    return config.federation.start == "own" and number == 0


def own_start(config: Config, initial: Adapter, client: int) -> Adapter:
    """Return the `initial` global adapter with the client's own A, from its stream ``start``, and B = 0."""
    stream = torch.Generator().manual_seed(derive(config.federation.seed, "start", client))
    return initial | draw(initial, stream)


def client_starts(
    config: Config, number: int, by_age: Mapping[int, Adapter], ages_of: Mapping[int, int]
) -> dict[int, Adapter]:
    """Return what each client starts from, or would have started from: cut to its rank and for its scaling.

    Args:
        config: of the run.
        number: rounds that led to the newest global adapter.
        by_age: age in rounds -> global adapter; 0: the newest.
        ages_of: client -> age of the global adapter that it starts from.
    """
    starts = {
        client: own_start(config, by_age[age], client) if has_own_start(config, number - age) else by_age[age]
        for client, age in ages_of.items()
    }
    return at_client_ranks(config, starts)


def client_anchors(
    config: Config, number: int, by_age: Mapping[int, Adapter], clients: Iterable[int]
) -> list[dict[int, Adapter]]:
    """Return FedGuCci's anchors before the start, newest first: each client's form of an older global adapter."""
    clients = list(clients)
    older = range(1, num_anchors(config, number))
    return [client_starts(config, number, by_age, dict.fromkeys(clients, age)) for age in older]
