"""Sampling of the clients of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from copra_fl.aggregation.secret_random import uniforms
from copra_fl.config import Config, FederationConfig
from copra_fl.seeding import generator


def eligible(num_examples: Mapping[int, int]) -> list[int]:
    """Return the clients that have training examples."""
    return sorted(client for client, count in num_examples.items() if count > 0)


def rate(federation: FederationConfig, num_eligible: int) -> float:
    """Return the probability that a given client is in a round."""
    return federation.round_size(num_eligible) / num_eligible


def num_wanted(config: Config, num_eligible: int, num_sampled: int) -> int:
    """Return the number of sampled clients that a round waits for: the others are over-sampled.

    In a private run that is all of them, however many a Poisson sample has: nobody may take the place of another.
    """
    return num_sampled if config.privacy.dp_clip else min(config.federation.round_size(num_eligible), num_sampled)


def sample(config: Config, clients: Sequence[int], server_round: int) -> list[int]:
    """Return the clients of a round, drawn from the eligible `clients` with the stream ``sampling``.

    In a private run each client is drawn independently with probability `rate` (Poisson sampling, as the accountant
    assumes), from the operating system's generator: nobody may know the sample.
    """
    federation = config.federation
    if config.privacy.dp_clip:
        threshold = rate(federation, len(clients))
        draws = uniforms(len(clients))
        return [client for client, draw in zip(clients, draws, strict=True) if draw <= threshold]
    number = federation.sample_size(len(clients))
    chosen = generator(federation.seed, "sampling", server_round).choice(clients, size=number, replace=False)
    return sorted(int(client) for client in chosen)
