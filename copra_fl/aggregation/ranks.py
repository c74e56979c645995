"""Adapters of unequal rank: client i trains rank r_i, the server keeps the largest rank, r.

padding   A_i with r - r_i rows of zeros, B_i with r - r_i columns of zeros: the product is the same, and the
          gradients of the zeros are zero, so they stay zero in training
scaling   a client trains W0 + s_i B_i A_i with its own s_i = alpha / r_i. The server's factors are for s:
          on the way up B_i <- s_i / s B_i, on the way down B_i <- s / s_i B_i. Without that, a client of small
          rank would have too little weight in an average
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from copra_fl.adapters.state import Adapter, Update, part_of
from copra_fl.config import Config
from copra_fl.seeding import assign


def client_ranks(config: Config, num_clients: int) -> Sequence[int]:
    """Return the rank of each client."""
    ranks = config.aggregation.rank_list
    if not ranks:
        return [config.model.rank] * num_clients
    return assign(ranks, config.aggregation.rank_assignment, num_clients, config.federation.seed, "ranks")


def relative_scaling(config: Config, rank: int) -> float:
    """Return s_i / s for a client of this rank."""
    return config.model.scaling(rank) / config.model.scaling(config.model.rank)


def cut(adapter: Adapter, rank: int) -> Adapter:
    """Return the first `rank` rows of each A and columns of each B, as views."""
    axis = {"A": 0, "B": 1}
    return {
        name: tensor.narrow(axis[part_of(name)], 0, rank) if part_of(name) in axis else tensor
        for name, tensor in adapter.items()
    }


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Pad the rows of each A and the columns of each B with zeros up to `rank`."""

    def padded(name: str, tensor: Tensor) -> Tensor:
        if part_of(name) == "A":
            return F.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        return F.pad(tensor, (0, rank - tensor.shape[1])) if part_of(name) == "B" else tensor

    return {name: padded(name, tensor) for name, tensor in adapter.items()}


def rescale(adapter: Mapping[str, Tensor], factor: float) -> Adapter:
    """Multiply each B by `factor`."""
    return {name: tensor * factor if part_of(name) == "B" else tensor for name, tensor in adapter.items()}


def at_client_ranks(config: Config, adapters: Mapping[int, Adapter]) -> dict[int, Adapter]:
    """Return the adapter of each client (at the global rank and scaling) at the client's own rank and scaling."""
    if not config.aggregation.client_ranks:
        return dict(adapters)
    ranks = client_ranks(config, config.data.num_clients)
    return {
        client: rescale(cut(adapter, ranks[client]), 1 / relative_scaling(config, ranks[client]))
        for client, adapter in adapters.items()
    }


def as_sent(config: Config, update: Update) -> Update:
    """Return an update that was trained with padding, cut to its client's rank."""
    if not config.aggregation.client_ranks:
        return update
    return replace(update, adapter=cut(update.adapter, client_ranks(config, config.data.num_clients)[update.client]))


def as_global(config: Config, update: Update) -> Update:
    """Return an update as sent by `as_sent` at the global rank and scaling."""
    if not config.aggregation.client_ranks:
        return update
    rank = client_ranks(config, config.data.num_clients)[update.client]
    return replace(update, adapter=pad(rescale(update.adapter, relative_scaling(config, rank)), config.model.rank))
