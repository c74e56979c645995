"""The plan of one round of local training: clients, configuration, starting points, amount of work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from copra_fl.adapters.compression import FEEDBACK
from copra_fl.adapters.state import Adapter, OptimizerState
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.checking import COUNTS, METRICS, Expected
from copra_fl.config import Config, TrainingConfig


@dataclass(frozen=True)
class Plan:
    """The instructions of the server to a cohort.

    Attributes:
        server_round: the round, from 1.
        clients: the cohort.
        config: the run's configuration.
        inspected: those of `clients` whose own adapters the server needs; the others may send one pooled update.
        last_rounds: client -> the newest round that used its update, after which its state is the one to go on from;
            a client that is not in it starts without state.
    """

    server_round: int
    clients: tuple[int, ...]
    config: Config
    inspected: tuple[int, ...] = ()
    last_rounds: Mapping[int, int] = field(default_factory=dict)

    @property
    def trained_parts(self) -> frozenset[str]:
        """The parts (`adapters.state.part_of`) that clients train in this round; all others stay bitwise the same."""
        return find_rule(self.config.aggregation.rule).trains(self.server_round)

    @property
    def collects_grams(self) -> bool:
        """True if clients collect and send Gram matrices in this round."""
        return find_rule(self.config.aggregation.rule).sends_grams(self.server_round)


@dataclass(frozen=True)
class Start:
    """The state from which one client trains.

    Attributes:
        adapter: the client's adapter and head before training.
        correction: c - c_k of SCAFFOLD, added to each gradient (`training.local_terms`); empty without control
            variates.
        optimizer: state of the local optimizer; empty where the client starts without moments.
        anchors: older global adapters that are FedGuCci's anchors after `adapter`, newest first.
    """

    adapter: Adapter
    correction: Adapter = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    anchors: tuple[Adapter, ...] = ()


def sent_parts(config: Config, server_round: int) -> frozenset[str]:
    """Return the parts that clients train and send in a round."""
    sent = find_rule(config.aggregation.rule).sends(server_round)
    return sent & {"head"} if config.copra.local_training == "head" else sent


def reported_metrics(config: Config) -> set[str]:
    """Return the metrics that the server gets of each client's training.

    If nodes add noise to what the server sees, loss, distance and operations, which depend on the examples, stay there.
    """
    return COUNTS if config.privacy.is_local else METRICS


def leaves_state(config: Config) -> bool:
    """Return whether clients keep state between rounds, so that each must train on the node that stores its state."""
    aggregation = config.aggregation
    return (
        find_rule(aggregation.rule).personal
        or aggregation.control_variates
        or config.training.optimizer_state == "client"
        or feeds_back(config)
    )


def feeds_back(config: Config) -> bool:
    """Return whether clients add the quantization error of a round to what they send in the next.

    The error of factors that the rule draws or recomputes does not fit the next ones.
    """
    return config.federation.uplink_dtype in FEEDBACK and find_rule(config.aggregation.rule).keeps_factors


def caches_state(config: Config) -> bool:
    """Return whether nodes cache the server's state, because a part of it may be unchanged after a round."""
    return find_rule(config.aggregation.rule).nodes_cache_state or config.copra.trains_subset


def num_steps(training: TrainingConfig, num_examples: int) -> int:
    """Return the number of optimizer steps of a client with `num_examples` examples in one round."""
    if training.local_epochs == 0:
        return training.local_steps
    per_step = training.batch_size * training.gradient_accumulation
    return -(-num_examples * training.local_epochs // per_step)


def expected_update(config: Config, num_groups: int, num_examples: int) -> Expected:
    """Return the properties that the update of a client with `num_examples` examples must have.

    Where nodes clip, a change may have any length: a limit of the server's choice would tell it how long changes are.
    """
    steps = num_steps(config.training, num_examples)
    if config.privacy.is_local:
        return Expected(num_groups, num_examples, steps, max_norm=0.0, has_loss=False)
    return Expected(num_groups, num_examples, steps, config.federation.max_update_norm)


def num_trained(training: TrainingConfig, num_examples: int) -> int:
    """Return the number of examples that a client trains on in one round, counting each pass: its expected work.

    With local-steps every batch is full, even if the client has fewer examples than a batch.
    """
    per_step = training.batch_size * training.gradient_accumulation
    return num_examples * training.local_epochs or training.local_steps * per_step
