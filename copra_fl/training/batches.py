"""Draw the steps of a client's round from named random streams: batches, masks, progress for the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from copra_fl.aggregation.ranks import client_ranks, relative_scaling
from copra_fl.config import TrainingConfig
from copra_fl.copra import schedule
from copra_fl.copra.layers import trained_layers
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
    """Yield the micro-batches of each optimizer step: arrays of example indices.

    Passes over the examples follow each other, each shuffled by `rng`. With local-epochs the last step is short; with
    local-steps every batch is full and can span two passes.
    With bucket-batches = k, the examples of every k batches are sorted by length (`lengths`, of all examples) before
    they are cut into batches again, in an order drawn from `buckets`, which is the same for all clients. A short batch
    keeps its examples.
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
    """Return the same examples in batches of similar length, `window` batches at a time.

    A short batch stays last with its own examples: if it took part, it would always have the longest texts.
    """
    bucketed: list[np.ndarray] = []
    for start in range(0, len(batches), window):
        part = batches[start : start + window]
        full = sum(len(batch) == len(part[0]) for batch in part)
        examples = np.concatenate(part[:full])
        cuts = np.split(examples[np.argsort(lengths[examples], kind="stable")], full)
        places = np.argsort(rng.random(window)[:full])
        bucketed += [cuts[place] for place in places] + part[full:]
    return bucketed


@dataclass(frozen=True)
class LocalSteps:
    """The steps of one client in one round, drawn before the training begins.

    Attributes:
        batches: the micro-batches of each optimizer step: arrays of example indices.
        masks: (steps, groups) bool, the gate groups that are on.
        scales: (steps,) factor of the adapters that are on, in addition to the scaling alpha / r of the server's rank.
        rank_scale: the part of `scales` that is due to the client's rank.
        positions: (steps,) position of the adapters on the line from the start of the round to the client's own, 1
            unless ``local-training = "line"`` (`training.points`).
        t: (steps,) progress of the federation, in [0, 1).
    """

    client: int
    batches: list[list[np.ndarray]]
    masks: np.ndarray
    scales: np.ndarray
    rank_scale: float
    positions: np.ndarray
    t: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)


def plan_steps(plan: Plan, data: FederatedData, client: int, num_groups: int) -> LocalSteps:
    """Draw the steps of `client` in the round of `plan`."""
    config, seed, server_round = plan.config, plan.config.federation.seed, plan.server_round
    indices = data.train[client]
    order, buckets = generator(seed, "order", server_round, client), generator(seed, "buckets", server_round)
    batches = list(data_order(indices, data.examples.lengths, config.training, order, buckets))
    masks, scales, rank_scale = draw_masks(plan, client, len(batches), num_groups)
    on_line = config.copra.local_training == "line"
    positions = generator(seed, "line", server_round, client).random(len(batches)) if on_line else np.ones(len(batches))
    t = (server_round - 1 + np.arange(len(batches)) / len(batches)) / config.federation.num_rounds
    return LocalSteps(client, batches, masks, scales, rank_scale, positions, t)


def draw_masks(plan: Plan, client: int, num_steps: int, num_groups: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return `masks`, `scales` and `rank_scale` of `LocalSteps` for the steps of `client` in the round of `plan`."""
    config, server_round = plan.config, plan.server_round
    copra, seed, rounds = config.copra, config.federation.seed, config.federation.num_rounds
    trained = trained_layers(config, num_groups, server_round, client)
    among, probabilities = schedule.client_masks(
        copra, seed, client, num_steps, num_groups, server_round, rounds, trained
    )
    masks = np.zeros((num_steps, num_groups), dtype=bool)
    masks[:, trained] = among
    ranks = client_ranks(config, config.data.num_clients) if config.aggregation.client_ranks else ()
    rank_scale = relative_scaling(config, ranks[client]) if ranks else 1.0
    return masks, rank_scale * schedule.scales(copra, among, probabilities), rank_scale
