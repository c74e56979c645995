"""The layers that a client trains in a round. All others have no gradient, do not travel, and are off in every step.

    layers-per-round = m, layer-selection =
        random   m of the L layers, drawn without replacement for each client and round
        cycle    the same m layers for all clients: turn k trains k m, ..., k m + m - 1 (mod L), from bottom to top, for
                 `rounds-per-layer` rounds. One pass has ceil(L / m) turns. `full-rounds` rounds of all layers come
                 before each pass
    client-depths = d_1, d_2, ... (a depth above L is L), depth-allocation =
        top      the last d_c layers of the model: nothing below them is in the backward pass
        random   d_c of the L layers, drawn without replacement for each client and round

The cycle is FedPart's (arXiv 2410.11559): one layer for two rounds, from shallow to deep, and in the authors' code five
rounds of the whole network before each pass. FedPart takes the classifier as one more layer of the cycle; here every
client trains the head in every round.

``depth-allocation = "random"`` is the allocation of FedRA (arXiv 2311.11227), and nothing else of it: FedRA gives a
client a smaller model with the allocated layers of the base alone. Here the forward pass has the whole base, so random
layers save traffic, but little memory, because the backward pass reaches down to the lowest of them. FedRA's authors
average over the clients that have a layer without weights; `weighting = "activity"` weights by examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.seeding import assign, generator


def client_depths(config: Config) -> Sequence[int]:
    """Return the depth of each client; empty if all train all layers. The number of clients must be known."""
    copra, depths = config.copra, config.copra.depth_list
    if not depths:
        return []
    return assign(depths, copra.depth_assignment, config.data.num_clients, config.federation.seed, "depths")


def deep_enough(config: Config, clients: Iterable[int]) -> list[int]:
    """Return those of `clients` that ``min-depth`` admits to training."""
    if not config.copra.min_depth:
        return list(clients)
    depths = client_depths(config)
    return [client for client in clients if depths[client] >= config.copra.min_depth]


def by_depth(config: Config, clients: Iterable[int]) -> dict[int, list[int]]:
    """Return depth -> its clients, from the smallest depth; all clients have depth 0 without client-depths."""
    depths, tiers = client_depths(config), dict[int, list[int]]()
    for client in clients:
        tiers.setdefault(depths[client] if depths else 0, []).append(client)
    return dict(sorted(tiers.items()))


def trained_layers(config: Config, num_groups: int, server_round: int, client: int) -> np.ndarray:
    """Return the gate groups that `client` trains in a round: indices, ascending.

    With ``mask-scope = "shared"`` the random layers of a round are the same for all clients, as its masks are.
    """
    copra = config.copra
    if not copra.trains_subset:
        return np.arange(num_groups)
    if copra.layers_per_round and copra.layer_selection == "cycle":
        return cycle(copra, num_groups, server_round)
    number = copra.layers_per_round or client_depths(config)[client]
    if copra.client_depths and copra.depth_allocation == "top":
        return np.arange(max(0, num_groups - number), num_groups)
    names = ("layers", server_round) if copra.mask_scope == "shared" else ("layers", server_round, client)
    return np.sort(generator(config.federation.seed, *names).permutation(num_groups)[:number])


def cycle(copra: CopraConfig, num_groups: int, server_round: int) -> np.ndarray:
    """Return the gate groups of a round of the cycle: indices, ascending."""
    turns = -(-num_groups // copra.layers_per_round)
    passes, position = divmod(server_round - 1, copra.full_rounds + turns * copra.rounds_per_layer)
    if position < copra.full_rounds:
        return np.arange(num_groups)
    turn = passes * turns + (position - copra.full_rounds) // copra.rounds_per_layer
    return np.sort((turn * copra.layers_per_round + np.arange(copra.layers_per_round)) % num_groups)


def check_layers(config: Config, num_groups: int) -> None:
    """Check layers-per-round against the model's number of layers, and that a client is deep enough to train.

    Raises ConfigError if the model has fewer gate groups than ``layers-per-round``, or if no client drew a depth of at
    least ``min-depth``.
    """
    copra = config.copra
    if copra.layers_per_round > num_groups:
        raise ConfigError(
            f"layers-per-round = {copra.layers_per_round} is more than the {num_groups} layers of the model "
            f"(gate-group = {copra.gate_group!r}); use at most {num_groups}, or 0 for all"
        )
    if copra.min_depth and not deep_enough(config, range(config.data.num_clients)):
        raise ConfigError(
            f"min-depth = {copra.min_depth} leaves all {config.data.num_clients} clients out: they drew the depths "
            f"{client_depths(config)}; use a smaller min-depth or another seed"
        )
