"""The layers that a client trains in a round. All others have no gradient, do not travel, and are off in every step.

    layers-per-round = m, layer-selection =
        random   m of the L layers, drawn without replacement for each client and round
        cycle    the same m layers for all clients: turn k trains k m, ..., k m + m - 1 (mod L), from bottom to top, for
                 `rounds-per-layer` rounds. One pass has ceil(L / m) turns. `full-rounds` rounds of all layers come
                 before each pass

The cycle is FedPart's (arXiv 2410.11559): one layer for two rounds, from shallow to deep, and in the authors' code five
rounds of the whole network before each pass. FedPart takes the classifier as one more layer of the cycle; here every
client trains the head in every round.
"""

from __future__ import annotations

import numpy as np

from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.seeding import generator


def trains_subset(config: Config) -> bool:
    """Return whether clients train only some of the layers."""
    return config.copra.layers_per_round > 0


def trained_layers(config: Config, num_groups: int, server_round: int, client: int) -> np.ndarray:
    """Return the gate groups that `client` trains in a round: indices, ascending.

    With ``mask-scope = "shared"`` the random layers of a round are the same for all clients, as its masks are.
    """
    copra = config.copra
    if not copra.layers_per_round:
        return np.arange(num_groups)
    if copra.layer_selection == "cycle":
        return cycle(copra, num_groups, server_round)
    names = ("layers", server_round) if copra.mask_scope == "shared" else ("layers", server_round, client)
    return np.sort(generator(config.federation.seed, *names).permutation(num_groups)[: copra.layers_per_round])


def cycle(copra: CopraConfig, num_groups: int, server_round: int) -> np.ndarray:
    """Return the gate groups of a round of the cycle: indices, ascending."""
    turns = -(-num_groups // copra.layers_per_round)
    passes, position = divmod(server_round - 1, copra.full_rounds + turns * copra.rounds_per_layer)
    if position < copra.full_rounds:
        return np.arange(num_groups)
    turn = passes * turns + (position - copra.full_rounds) // copra.rounds_per_layer
    return np.sort((turn * copra.layers_per_round + np.arange(copra.layers_per_round)) % num_groups)


def check_layers(config: Config, num_groups: int) -> None:
    """Raise ConfigError if the model has fewer gate groups than the configuration asks for."""
    if config.copra.layers_per_round > num_groups:
        raise ConfigError(
            f"layers-per-round = {config.copra.layers_per_round} is more than the {num_groups} layers of the model "
            f"(gate-group = {config.copra.gate_group!r}); use at most {num_groups}, or 0 for all"
        )
