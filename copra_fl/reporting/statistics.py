"""Summarize runs over seeds: means, Student's 95 % intervals, differences paired by seed.

Methods are compared **paired by seed**: runs with the same seed share partitions, initial adapters and data order, so
the difference of a pair has less noise than either run. With n seeds, mean m and standard deviation s (n - 1 degrees
of freedom), the 95 % interval is Student's: m ± t(0.975, n - 1) s / sqrt(n). One seed or two have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from copra_fl.records import (
    MIN_SEEDS,
    ComparedSettings,
    ComparisonSummary,
    EarlyEnd,
    Estimate,
    Evaluation,
    MetricEstimates,
    RoundRecord,
    UnfinishedRun,
)
from copra_fl.reporting import work
from copra_fl.reporting.results import Comparison, Run
from copra_fl.reporting.verdict import verdict

CONFIDENCE = 0.95

#: ends of the names of metrics in [0, 1]
SHARES = ("_accuracy", "_f1", "majority")
#: metrics that are differences themselves
SIGNED = ("merge_gap_accuracy", "merge_gap_loss", "barrier_frankle", "midpoint_gap")

Value = TypeVar("Value")
#: metric -> value of a finished run; None where it was not measured
Metrics = dict[str, float | None]


def estimate(values: Sequence[float | None], low: float = -math.inf, high: float = math.inf) -> Estimate:
    """Return the mean and 95 % t-interval of one value per seed, within the possible values `low` to `high`.

    >>> [round(end, 3) for end in estimate([1.0, 2.0, 3.0]).interval]  # 2 ± 4.3027 * 1 / sqrt(3)
    [-0.484, 4.484]
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite or len(finite) < len(values):  # the mean of the seeds that did not diverge would flatter
        return Estimate(mean=None, interval=None, values=tuple(v if v in finite else None for v in values))
    mean = fmean(finite)
    if len(finite) < MIN_SEEDS:
        return Estimate(mean=mean, interval=None, values=tuple(values))
    half = half_width(finite)
    return Estimate(mean=mean, interval=(max(mean - half, low), min(mean + half, high)), values=tuple(values))


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t-interval of the mean of two or more values."""
    return float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(len(values))


def possible_range(metric: str, is_difference: bool) -> tuple[float, float]:
    """Return the lowest and the highest value that one of `metrics`, or a difference of two, can have.

    >>> possible_range("test_accuracy", False), possible_range("test_accuracy", True), possible_range("seconds", False)
    ((0.0, 1.0), (-1.0, 1.0), (0.0, inf))
    """
    name = metric.partition("/")[0]
    is_share = name.endswith(SHARES)
    if name in SIGNED or is_difference:
        return (-1.0, 1.0) if is_share and name not in SIGNED else (-math.inf, math.inf)
    return 0.0, 1.0 if is_share else math.inf


def metrics(run: Run) -> Metrics:
    """Return the numbers of a finished run that are compared: accuracies in [0, 1], losses in nats, bytes, seconds.

    Rounds, steps of a client, passes, operations and the error relative to the change are those of the run's journal.
    ``client_accuracy`` is measured on the clients' own validation data and weighted by examples; it is that of the
    global model, or with a personal rule that of each client's own model. Barriers and midpoint gap are means over the
    run's pairs of clients. With several data sets, test metrics are means over them, and ``test_accuracy/NAME`` and
    ``test_loss/NAME`` are those of each data set.
    """
    summary = run.summary
    assert summary is not None, "only finished runs are compared"
    gap, paths, clients = summary.merge_gap, summary.paths, summary.clients
    passes = work.passes(run.config, run.journal)
    examples = sum(client.examples for client in clients)
    correct = sum(client.examples * client.accuracy for client in clients)
    test, held_out = _evaluation("test", summary.test), _evaluation("held_out", summary.held_out)
    validation = _evaluation("validation", summary.validation)
    datasets = summary.test.datasets if summary.test else {}
    return (
        test
        | held_out
        | validation
        | {
            "majority": summary.test.metrics.get("majority") if summary.test else None,
            "base_accuracy": summary.base_test.accuracy if summary.base_test else None,
            "client_accuracy": correct / examples if examples else None,
            "aggregation_error": summary.aggregation_error,
            "aggregation_error_of_change": work.error_of_change(run.journal),
            "merge_gap_accuracy": gap.accuracy if gap else None,
            "merge_gap_loss": gap.loss if gap else None,
            "bytes_up": summary.bytes_up,
            "bytes_down": summary.bytes_down,
            "bytes": summary.bytes_up + summary.bytes_down,
            "seconds": summary.seconds,
            "rounds": len(run.journal),
            "steps": work.mean_steps(run.journal),
            "passes": passes.mean if passes else None,
            "passes_lowest": passes.lowest if passes else None,
            "passes_highest": passes.highest if passes else None,
            "flops": work.flops(run.journal),
            "barrier_entezari": fmean(path.barrier_entezari for path in paths) if paths else None,
            "barrier_frankle": fmean(path.barrier_frankle for path in paths) if paths else None,
            "midpoint_gap": fmean(path.midpoint_gap for path in paths) if paths else None,
        }
        | {f"test_accuracy/{name}": evaluation.accuracy for name, evaluation in datasets.items()}
        | {f"test_loss/{name}": evaluation.loss for name, evaluation in datasets.items()}
    )


def round_metrics(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a round under the names that trackers group by, without those that were not measured.

    Losses in nats, accuracies in [0, 1], bytes and seconds of the round, epsilon of all rounds so far.
    """
    validation, gap = record.validation, record.merge_gap
    datasets = validation.datasets if validation else {}
    return measured(
        {
            "train/loss": record.train_loss,
            "validation/loss": validation.loss if validation else None,
            "validation/accuracy": validation.accuracy if validation else None,
            **{f"validation/{name}": value for name, value in (validation.metrics if validation else {}).items()},
            "merge_gap/loss": gap.loss if gap else None,
            "merge_gap/accuracy": gap.accuracy if gap else None,
            "aggregation_error": record.aggregation_error.total if record.aggregation_error else None,
            "aggregation_error_of_change": record.aggregation_error.of_change if record.aggregation_error else None,
            "privacy/epsilon": record.privacy.epsilon if record.privacy else None,
            "privacy/server_epsilon": record.privacy.server_epsilon if record.privacy else None,
            "clients/trained": len(record.clients),
            "clients/missing": len(record.missing),
            "bytes/up": record.bytes_up,
            "bytes/down": record.bytes_down,
            "seconds": record.seconds,
            "flops": work.flops([record]),
        }
        | {f"validation/{name}/loss": evaluation.loss for name, evaluation in datasets.items()}
        | {f"validation/{name}/accuracy": evaluation.accuracy for name, evaluation in datasets.items()}
    )


def measured(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return `values` without those that are None."""
    return {name: float(value) for name, value in values.items() if value is not None}


def _evaluation(split: str, evaluation: Evaluation | None) -> Metrics:
    return {
        f"{split}_accuracy": evaluation.accuracy if evaluation else None,
        f"{split}_loss": evaluation.loss if evaluation else None,
        f"{split}_macro_f1": evaluation.metrics.get("macro_f1") if evaluation else None,
        f"{split}_balanced_accuracy": evaluation.metrics.get("balanced_accuracy") if evaluation else None,
        f"{split}_perplexity": evaluation.metrics.get("perplexity") if evaluation else None,
    }


def summarize(comparison: Comparison) -> ComparisonSummary:
    """Return the summary of `comparison`: estimates of all metrics, differences to the first method, verdict."""
    by_method = {
        method: {run.seed: metrics(run) for run in comparison.finished_runs(method)} for method in comparison.methods
    }
    baseline, *others = by_method
    finished = {method: comparison.finished_runs(method) for method in by_method}
    curves = {method: curve for method, runs in finished.items() if (curve := work.curve(runs))}
    goals = work.targets(finished[baseline])
    common, differing = partition_settings(
        {method: runs[0].config.to_flat() for method, runs in comparison.methods.items() if runs}
    )
    common.pop("seed", None)
    summary = ComparisonSummary(
        baseline=baseline,
        seeds=tuple(comparison.seeds),
        methods={method: _estimates(by_seed) for method, by_seed in by_method.items()},
        differences={
            method: _estimates(_paired_differences(by_method[method], by_method[baseline]), are_differences=True)
            for method in others
        },
        personal=tuple(
            method for method in by_method if any(summary.personal for _, summary in comparison.finished(method))
        ),
        settings=ComparedSettings(common=common, differing=differing),
        unfinished=tuple(
            UnfinishedRun(method=method, seed=seed, rounds=comparison.rounds_done(method, seed))
            for method, by_seed in by_method.items()
            for seed in comparison.seeds
            if seed not in by_seed
        ),
        ended_early=tuple(
            EarlyEnd(method=method, seed=seed, round=summary.rounds, reason=summary.ended_early)
            for method in by_method
            for seed, summary in comparison.finished(method)
            if summary.ended_early
        ),
        curves=curves,
        to_target={method: work.cost_to_target(finished[method], goals) for method in curves} if goals else {},
    )
    return summary.model_copy(update={"verdict": verdict(summary)})


def _paired_differences(minuends: Mapping[int, Metrics], subtrahends: Mapping[int, Metrics]) -> dict[int, Metrics]:
    """Return seed -> metric -> difference, for the seeds that both have."""
    return {
        seed: {
            name: None if value is None or (other := subtrahends[seed].get(name)) is None else value - other
            for name, value in minuends[seed].items()
        }
        for seed in minuends
        if seed in subtrahends
    }


def _estimates(by_seed: Mapping[int, Metrics], are_differences: bool = False) -> MetricEstimates:
    values = {name: [run[name] for run in by_seed.values()] for name in next(iter(by_seed.values()), {})}
    estimates = {
        name: estimate(of_seeds, *possible_range(name, are_differences))
        for name, of_seeds in values.items()
        if any(value is not None for value in of_seeds)
    }
    return MetricEstimates.model_validate({"seeds": tuple(by_seed), **estimates})


def partition_settings(
    settings: Mapping[str, Mapping[str, Value]],
) -> tuple[dict[str, Value], dict[str, dict[str, Value | None]]]:
    """Return key -> value where all `settings` agree, and key -> owner -> value (None if absent) where they differ."""
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    first = next(iter(settings.values()), {})
    common = {
        key: first[key]
        for key in keys
        if all(key in flat and key in first and flat[key] == first[key] for flat in settings.values())
    }
    return common, {
        key: {owner: flat.get(key) for owner, flat in settings.items()} for key in keys if key not in common
    }


def activity(runs: Sequence[Run]) -> dict[int, npt.NDArray[np.float64]]:
    """Return round -> (L,) share of steps in which each of L gate groups was on, averaged over clients and runs."""
    shares: dict[int, list[npt.NDArray[np.float64]]] = {}
    for run in runs:
        for record in run.journal:
            shares.setdefault(record.round, []).extend(
                np.asarray(client.active_steps) / client.steps for client in record.clients
            )
    return {number: np.mean(clients, axis=0) for number, clients in sorted(shares.items())}
