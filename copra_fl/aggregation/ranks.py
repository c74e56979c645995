"""Adapters of unequal rank: each client trains its own rank r_i, the server holds the largest, r.

padded    A_i with r - r_i rows of zeros, B_i with as many columns of zeros: the same product, and in training
          their gradients are zero, so they stay zero
scaling   a client trains W0 + s_i B_i A_i, s_i its own alpha / r_i. The server's factors are for s:
          up B_i <- s_i / s B_i, down B_i <- s / s_i B_i. Averaged without that, a client of small rank counts too
          little
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from copra_fl.adapters.state import Adapter, Update, part_of
from copra_fl.config import Config, ConfigError
from copra_fl.seeding import generator


def client_ranks(config: Config, num_clients: int) -> list[int]:
    """The rank of each client. Raises ConfigError for ranks that are not numbers, too large, or not one a client."""
    text, rank = config.aggregation.client_ranks, config.model.rank
    if not text:
        return [rank] * num_clients
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"client-ranks = {text!r} is not a list of whole numbers like 8,4,2") from None
    if not all(1 <= each <= rank for each in ranks):
        raise ConfigError(f"client-ranks = {text!r}: each must be at least 1 and at most rank = {rank}")
    if config.aggregation.rank_assignment == "drawn":
        return [int(each) for each in generator(config.federation.seed, "ranks").choice(ranks, num_clients)]
    if len(ranks) != num_clients:
        raise ConfigError(
            f"client-ranks = {text!r} has {len(ranks)} ranks for {num_clients} clients; give one a client, or let "
            "rank-assignment = 'drawn' draw from them"
        )
    return ranks


def relative_scaling(config: Config, rank: int) -> float:
    """s_i / s of a client of this rank."""
    return config.model.scaling(rank) / config.model.scaling(config.model.rank)


def cut(adapter: Adapter, rank: int) -> Adapter:
    """The first `rank` rows of each A and columns of each B: views."""
    axis = {"A": 0, "B": 1}
    return {
        name: tensor.narrow(axis[part_of(name)], 0, rank) if part_of(name) in axis else tensor
        for name, tensor in adapter.items()
    }


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Zeros after the rows of each A and the columns of each B, up to `rank`."""

    def padded(name: str, tensor: Tensor) -> Tensor:
        if part_of(name) == "A":
            return F.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        return F.pad(tensor, (0, rank - tensor.shape[1])) if part_of(name) == "B" else tensor

    return {name: padded(name, tensor) for name, tensor in adapter.items()}


def rescale(adapter: Mapping[str, Tensor], factor: float) -> Adapter:
    """Every B times `factor`."""
    return {name: tensor * factor if part_of(name) == "B" else tensor for name, tensor in adapter.items()}


def client_starts(config: Config, adapter: Adapter, clients: Iterable[int]) -> dict[int, Adapter]:
    """The global `adapter` as each client takes it over: cut to its rank, for its scaling."""
    if not config.aggregation.client_ranks:
        return dict.fromkeys(clients, adapter)
    ranks = client_ranks(config, config.data.num_clients)
    return {c: rescale(cut(adapter, ranks[c]), 1 / relative_scaling(config, ranks[c])) for c in clients}


def as_sent(config: Config, update: Update) -> Update:
    """An update that was trained padded, cut to its client's rank."""
    if not config.aggregation.client_ranks:
        return update
    return replace(update, adapter=cut(update.adapter, client_ranks(config, config.data.num_clients)[update.client]))


def as_global(config: Config, update: Update) -> Update:
    """An update as it was sent, at the global rank and scaling."""
    if not config.aggregation.client_ranks:
        return update
    rank = client_ranks(config, config.data.num_clients)[update.client]
    return replace(update, adapter=pad(rescale(update.adapter, relative_scaling(config, rank)), config.model.rank))
