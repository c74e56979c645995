"""The work of a run, from its journal: steps, passes over own data, operations, and the cost to reach an accuracy.

Costs add up over rounds: bytes of all messages up, bytes up and down, and the estimated operations of the clients'
training (`models.flops`). Evaluation is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from copra_fl.config import Config
from copra_fl.records import Curve, Passes, RoundRecord, TargetCost, Tier
from copra_fl.reporting.results import Run


class Point(NamedTuple):
    """An evaluated round: validation accuracy, and the cost of this and all earlier rounds; None for unknown FLOPs."""

    round: int
    accuracy: float
    bytes_up: int
    bytes: int
    flops: float | None


class DepthWork(NamedTuple):
    """Work of the clients that train `depth` layers, means over rounds; per client and round but for `clients`.

    Attributes:
        clients: number that trained in a round.
        memory: bytes that autograd kept (`records.Tier`).
        flops: operations; None if the journal lacks them.
    """

    depth: int
    clients: float
    seconds: float
    memory: float
    flops: float | None


def points(journal: Sequence[RoundRecord]) -> list[Point]:
    """Return the evaluated rounds of a run."""
    evaluated = []
    up = down = 0
    operations: float | None = 0
    for record in journal:
        up, down = up + record.bytes_up, down + record.bytes_down
        of_round = flops([record])
        operations = None if operations is None or of_round is None else operations + of_round
        if record.validation:
            evaluated.append(Point(record.round, record.validation.accuracy, up, up + down, operations))
    return evaluated


def flops(journal: Sequence[RoundRecord]) -> float | None:
    """Return the operations of all clients in all rounds; None if the journal lacks some of them."""
    counts = [client.flops for record in journal for client in record.clients]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def work_by_depth(runs: Sequence[Run]) -> list[DepthWork]:
    """Return the work at each depth, the deepest first; empty without ``client-depths``."""
    of_depth: dict[int, list[tuple[Tier, RoundRecord]]] = {}
    for run in runs:
        for record in run.journal:
            for tier in record.tiers:
                of_depth.setdefault(tier.depth, []).append((tier, record))
    table = []
    for depth, rounds in sorted(of_depth.items(), reverse=True):
        counts = [client.flops for tier, record in rounds for client in record.clients if client.client in tier.clients]
        known = [count for count in counts if count is not None]
        table.append(
            DepthWork(
                depth=depth,
                clients=fmean(len(tier.clients) for tier, _ in rounds),
                seconds=fmean(tier.seconds for tier, _ in rounds),
                memory=fmean(tier.memory for tier, _ in rounds),
                flops=fmean(known) if len(known) == len(counts) else None,
            )
        )
    return table


def mean_steps(journal: Sequence[RoundRecord]) -> float | None:
    """Return the optimizer steps of a client in all rounds, mean over the clients that took part."""
    steps: dict[int, float] = {}
    for record in journal:
        for client in record.clients:
            steps[client.client] = steps.get(client.client, 0.0) + client.steps
    return fmean(steps.values()) if steps else None


def passes(config: Config, journal: Sequence[RoundRecord]) -> Passes | None:
    """Return the passes of the clients that took part over their own training examples: steps x batch / examples.

    None with ``engine = trainer``, where the script decides how large a batch is.
    """
    training, by_client = config.training, dict[int, float]()
    if training.engine == "trainer":
        return None
    for record in journal:
        for client in record.clients:
            examples = client.steps * training.batch_size * training.gradient_accumulation
            number = training.local_epochs or examples / client.examples
            by_client[client.client] = by_client.get(client.client, 0.0) + number
    if not by_client:
        return None
    return Passes(mean=fmean(by_client.values()), lowest=min(by_client.values()), highest=max(by_client.values()))


def error_of_change(journal: Sequence[RoundRecord]) -> float | None:
    """Return the aggregation error relative to the round's change, mean over the rounds in which it is known."""
    errors = [record.aggregation_error.of_change for record in journal if record.aggregation_error]
    known = [error for error in errors if error is not None]
    return fmean(known) if known else None


def curve(runs: Sequence[Run]) -> Curve | None:
    """Return accuracy against cost, mean over `runs` at the rounds that all of them evaluated; None without such."""
    by_round = [{point.round: point for point in points(run.journal)} for run in runs]
    rounds = sorted(set.intersection(*map(set, by_round))) if by_round else []
    if not rounds:
        return None
    columns = [[of_run[number] for of_run in by_round] for number in rounds]
    operations = [[point.flops for point in column if point.flops is not None] for column in columns]
    return Curve(
        rounds=tuple(rounds),
        accuracy=tuple(fmean(point.accuracy for point in column) for column in columns),
        lowest=tuple(min(point.accuracy for point in column) for column in columns),
        highest=tuple(max(point.accuracy for point in column) for column in columns),
        bytes_up=tuple(fmean(point.bytes_up for point in column) for column in columns),
        bytes=tuple(fmean(point.bytes for point in column) for column in columns),
        flops=tuple(map(fmean, operations)) if all(len(known) == len(runs) for known in operations) else None,
    )


def targets(baseline: Sequence[Run]) -> dict[int, float]:
    """Return seed -> accuracy to reach: target-accuracy if it is set, else the baseline's last one with that seed."""
    return {
        run.seed: run.config.evaluation.target_accuracy or evaluated[-1].accuracy
        for run in baseline
        if (evaluated := points(run.journal))
    }


def cost_to_target(runs: Sequence[Run], goals: Mapping[int, float]) -> TargetCost:
    """Return the cost of each run up to its first evaluation with the accuracy that `goals` has for its seed."""
    compared = [run for run in runs if run.seed in goals]
    first = [
        next((point for point in points(run.journal) if point.accuracy >= goals[run.seed]), None) for run in compared
    ]
    return TargetCost(
        seeds=tuple(run.seed for run in compared),
        targets=tuple(goals[run.seed] for run in compared),
        rounds=tuple(point and point.round for point in first),
        bytes_up=tuple(point and point.bytes_up for point in first),
        bytes=tuple(point and point.bytes for point in first),
        flops=tuple(point and point.flops for point in first),
    )
