"""One round: train on the nodes and aggregate, then evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.serverapp import Grid

from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.events import emit
from copra_fl.records import ClientEvaluation, Evaluation, LinePath, MergeGap, PrivacySpent
from server.early_end import end_reason
from server.eval_selection import is_evaluated, merge_gap_clients, path_pairs
from server.evaluator import Evaluator
from server.messaging import exchange
from server.round_request import RoundRequest
from server.secure_round import SecureRound
from server.strategy import CohortStrategy, TrainResult


@dataclass(frozen=True)
class RoundTraining:
    """One round of local training and aggregation.

    Attributes:
        seconds: from sending the first message to the new global adapter.
        bytes_down, bytes_up: contents of all messages to and from the nodes.
        privacy: spent up to this round; None in a run that is not private.
    """

    request: RoundRequest
    result: TrainResult
    seconds: float
    bytes_down: int
    bytes_up: int
    privacy: PrivacySpent | None = None


def train_round(
    grid: Grid,
    strategy: CohortStrategy,
    server_round: int,
    charge: Callable[[Sequence[int]], PrivacySpent | None] = lambda clients: None,
) -> RoundTraining:
    """Train and aggregate one round; the strategy has the next state afterwards.

    `charge` charges the privacy budget for a release of the sampled clients, and returns the privacy spent.
    """
    started = time.perf_counter()
    request, messages = strategy.configure_train(server_round)
    emit("round", round=server_round, clients=len(request.clients))
    secure = None
    if request.is_masked:
        secure = SecureRound(grid, strategy.run, request, strategy.partitions, lambda: charge(request.clients))
        messages = secure.open(messages)
    replies = exchange(
        grid, messages, strategy.run.config.federation.round_timeout_s, request.enough,
        on_replies=lambda replies: emit("replied", clients=request.num_answered(replies)),
    )  # fmt: skip
    result = strategy.aggregate_train(request, replies, secure)
    bytes_down = sum(wire.num_bytes(message.content) for message in messages)
    bytes_up = sum(wire.num_bytes(reply.content) for reply in replies if reply.has_content())
    return RoundTraining(
        request,
        result,
        seconds=time.perf_counter() - started,
        bytes_down=bytes_down + (secure.bytes_down if secure else 0),
        bytes_up=bytes_up + (secure.bytes_up if secure else 0),
        privacy=secure.privacy if secure else charge(request.clients),
    )


@dataclass(frozen=True)
class RoundEvaluation:
    """Evaluation after a round; the fields are None or empty if the round is not evaluated.

    Attributes:
        ended_early: the reason to end the run after this round (`early_end.end_reason`).
    """

    validation: Evaluation | None = None
    merge_gap: MergeGap | None = None
    paths: tuple[LinePath, ...] = ()
    ended_early: str | None = None


def evaluate_round(
    grid: Grid,
    strategy: CohortStrategy,
    evaluator: Evaluator,
    before: ServerState,
    training: RoundTraining,
    accuracies: Sequence[float],
) -> RoundEvaluation:
    """Evaluate a round: on the server's data, or on the clients' if the server has no data.

    `before` is the state before the round, `accuracies` are those of the earlier evaluations.
    """
    config, request = strategy.run.config, training.request
    server_round, clients = request.server_round, request.clients
    if not is_evaluated(config, server_round):
        return RoundEvaluation()
    emit("evaluating", round=server_round)
    if not config.data.dataset:
        mean = weighted_mean(evaluate_clients(grid, strategy, server_round))
        of_clients = [*accuracies, mean.accuracy] if mean else accuracies
        return RoundEvaluation(mean, ended_early=end_reason(config, server_round, of_clients))
    updates = {update.client: update for update in training.result.updates}
    chosen = merge_gap_clients(config, server_round, clients)
    validation, gap = evaluator.round_metrics(strategy.state, before, [updates[c] for c in chosen if c in updates])
    ended_early = end_reason(config, server_round, [*accuracies, validation.accuracy])
    is_last = server_round == config.federation.num_rounds or ended_early is not None
    pairs = path_pairs(config, clients) if is_last else []
    inspected = updates.keys() & request.inspected
    paths = evaluator.paths(before, [(updates[a], updates[b]) for a, b in pairs if {a, b} <= inspected])
    return RoundEvaluation(validation, gap, paths, ended_early)


def evaluate_clients(grid: Grid, strategy: CohortStrategy, server_round: int) -> list[ClientEvaluation]:
    """Evaluate the global adapter after a round on each client's own validation data."""
    request, messages = strategy.configure_evaluate(server_round)
    replies = exchange(grid, messages, strategy.run.config.federation.round_timeout_s)
    return strategy.aggregate_evaluate(request, replies)


def weighted_mean(clients: Sequence[ClientEvaluation]) -> Evaluation | None:
    """Return mean loss and accuracy over the validation examples of all clients; None without clients."""
    if not clients:
        return None
    examples = [client.examples for client in clients]
    return Evaluation(
        loss=float(np.average([client.loss for client in clients], weights=examples)),
        accuracy=float(np.average([client.accuracy for client in clients], weights=examples)),
        examples=sum(examples),
    )
