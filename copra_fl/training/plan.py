"""The plan of a cohort's round: clients, configuration, amount of work."""

from __future__ import annotations

from dataclasses import dataclass

from copra_fl.adapters.compression import FEEDBACK
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.checking import Expected
from copra_fl.config import Config, TrainingConfig


@dataclass(frozen=True)
class Plan:
    """What the server tells a cohort.

    Attributes:
        server_round: the round, from 1.
        clients: the cohort.
        config: the run's configuration.
        inspected: those of `clients` whose own adapters the server needs; the others may send one pooled update.
    """

    server_round: int
    clients: tuple[int, ...]
    config: Config
    inspected: tuple[int, ...] = ()

    @property
    def trained_parts(self) -> frozenset[str]:
        """The parts (`adapter.part_of`) that clients train in this round; all else stays bit by bit."""
        return find_rule(self.config.aggregation.rule).trains(self.server_round)


def leaves_state(config: Config) -> bool:
    """Whether clients leave anything behind for their next round; they must then be trained where it lies."""
    aggregation = config.aggregation
    return (
        find_rule(aggregation.rule).personal
        or aggregation.control_variates
        or config.federation.uplink_dtype in FEEDBACK
    )


def num_steps(training: TrainingConfig, num_examples: int) -> int:
    """Optimiser steps of one client in one round."""
    if training.local_epochs == 0:
        return training.local_steps
    per_step = training.batch_size * training.gradient_accumulation
    return -(-num_examples * training.local_epochs // per_step)


def expected_update(config: Config, num_groups: int, num_examples: int) -> Expected:
    """What must be true of the update of a client with `num_examples` examples."""
    steps = num_steps(config.training, num_examples)
    return Expected(num_groups, num_examples, steps, config.federation.max_update_norm)


def num_trained(training: TrainingConfig, num_examples: int) -> int:
    """Examples that one client trains on in one round, each pass counted: its expected work.

    With local-steps every batch is full, also of a client with fewer examples than a batch.
    """
    per_step = training.batch_size * training.gradient_accumulation
    return num_examples * training.local_epochs or training.local_steps * per_step
