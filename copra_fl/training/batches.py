"""The steps of a client's round: batches, masks and learning-rate progress, drawn from named streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from copra_fl.aggregation.ranks import client_ranks, relative_scaling
from copra_fl.config import TrainingConfig
from copra_fl.copra import schedule
from copra_fl.data.federated import FederatedData
from copra_fl.seeding import generator
from copra_fl.training.plan import Plan, num_trained


def data_order(
    indices: np.ndarray,
    lengths: np.ndarray,
    training: TrainingConfig,
    rng: np.random.Generator,
    buckets: np.random.Generator,
) -> Iterator[list[np.ndarray]]:
    """The micro-batches of each optimiser step: arrays of example indices.

    Examples come in shuffled passes, one after the other. With local-epochs the last
    step is short; with local-steps every batch is full and passes run into each other.
    With bucket-batches = k, every k batches are sorted by length (`lengths`, of all examples)
    before they are cut, and come in an order drawn from `buckets`, the same for all clients.
    """
    total = num_trained(training, len(indices))
    passes = [rng.permutation(indices) for _ in range(-(-total // len(indices)))]
    order = np.concatenate(passes)[:total]
    batches = [order[start : start + training.batch_size] for start in range(0, total, training.batch_size)]
    if training.bucket_batches > 1:
        batches = _bucket(batches, lengths, training.bucket_batches, buckets)
    for start in range(0, len(batches), training.gradient_accumulation):
        yield batches[start : start + training.gradient_accumulation]


def _bucket(batches: list[np.ndarray], lengths: np.ndarray, window: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same examples in batches of like length, `window` batches at a time; a short batch stays the last."""
    bucketed: list[np.ndarray] = []
    for start in range(0, len(batches), window):
        part = batches[start : start + window]
        examples = np.concatenate(part)
        by_length = examples[np.argsort(lengths[examples], kind="stable")]
        cuts = np.split(by_length, np.cumsum([len(batch) for batch in part])[:-1])
        full = sum(len(batch) == len(part[0]) for batch in part)
        places = np.argsort(rng.random(window)[:full])
        bucketed += [cuts[place] for place in places] + cuts[full:]
    return bucketed


@dataclass(frozen=True)
class LocalSteps:
    """What one client does in a round, drawn from its streams before it begins.

    Attributes:
        batches: the micro-batches of each optimiser step: arrays of example indices.
        masks: (steps, groups) bool, which gate groups are on.
        scales: (steps,) what is on is multiplied by besides the scaling of the server's rank.
        t: (steps,) progress of the federation.
    """

    client: int
    batches: list[list[np.ndarray]]
    masks: np.ndarray
    scales: np.ndarray
    t: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)


def plan_steps(plan: Plan, data: FederatedData, client: int, num_groups: int) -> LocalSteps:
    """The steps of `client` in the plan's round."""
    config, seed, server_round = plan.config, plan.config.federation.seed, plan.server_round
    copra, rounds = config.copra, config.federation.num_rounds
    indices = data.train[client]
    order, buckets = generator(seed, "order", server_round, client), generator(seed, "buckets", server_round)
    batches = list(data_order(indices, data.examples.lengths, config.training, order, buckets))
    masks, probabilities = schedule.client_masks(copra, seed, client, len(batches), num_groups, server_round, rounds)
    ranks = client_ranks(config, config.data.num_clients) if config.aggregation.client_ranks else ()
    relative = relative_scaling(config, ranks[client]) if ranks else 1.0
    scales = relative * schedule.scales(copra, masks, probabilities)
    t = (server_round - 1 + np.arange(len(batches)) / len(batches)) / rounds
    return LocalSteps(client, batches, masks, scales, t)
