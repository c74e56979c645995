"""Summarize runs over seeds: means, Student's 95 % intervals, differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from copra_fl.reporting.results import (
    Comparison,
    Run,
)

CONFIDENCE = 0.95


class Estimate(TypedDict):
    """A number over seeds. `mean` is None where a seed has no finite value, `interval` also for one seed."""

    mean: float | None
    interval: tuple[float, float] | None
    values: list[float | None]


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and 95 % t-interval of one value a seed.

    >>> [round(end, 3) for end in estimate([1.0, 2.0, 3.0])["interval"]]  # 2 ± 4.3027 * 1 / sqrt(3)
    [-0.484, 4.484]
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite or len(finite) < len(values):  # the mean of the seeds that did not diverge would flatter
        return {"mean": None, "interval": None, "values": [value if value in finite else None for value in values]}
    mean = fmean(finite)
    if len(finite) == 1:
        return {"mean": mean, "interval": None, "values": list(values)}
    half = float(stdtrit(len(finite) - 1, (1 + CONFIDENCE) / 2)) * stdev(finite) / math.sqrt(len(finite))
    return {"mean": mean, "interval": (mean - half, mean + half), "values": list(values)}


def metrics(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a finished run that are compared: accuracies in [0, 1], losses in nats, bytes, seconds.

    Client accuracy is that on the clients' own validation data, weighted by examples: of the global model, or of each
    client's own where there is none. Barriers and midpoint gap are means over the run's pairs of clients. A number
    that the run does not have, or was not asked for, is None. With several data sets test numbers are means over them;
    each one's own are there too, under ``test_accuracy/NAME`` and ``test_loss/NAME``.
    """
    test, validation, gap, held_out = (
        summary.get(part) or {} for part in ("test", "validation", "merge_gap", "held_out")
    )
    paths, clients = summary["paths"], summary["clients"]
    examples = sum(client["examples"] for client in clients)
    right = sum(client["examples"] * client["accuracy"] for client in clients)
    return (
        {
            "test_accuracy": test.get("accuracy"),
            "test_loss": test.get("loss"),
            "test_perplexity": test.get("perplexity"),
            "held_out_accuracy": held_out.get("accuracy"),
            "held_out_loss": held_out.get("loss"),
            "held_out_perplexity": held_out.get("perplexity"),
            "validation_accuracy": validation.get("accuracy"),
            "validation_loss": validation.get("loss"),
            "client_accuracy": right / examples if examples else None,
            "aggregation_error": summary.get("aggregation_error"),
            "merge_gap_accuracy": gap.get("accuracy"),
            "merge_gap_loss": gap.get("loss"),
            "bytes_up": summary["bytes_up"],
            "bytes_down": summary["bytes_down"],
            "bytes": summary["bytes_up"] + summary["bytes_down"],
            "seconds": summary["seconds"],
        }
        | {
            name: fmean(path[name] for path in paths) if paths else None
            for name in ("barrier_entezari", "barrier_frankle", "midpoint_gap")
        }
        | {
            f"test_{metric}/{name}": own[metric]
            for name, own in test.get("datasets", {}).items()
            for metric in ("accuracy", "loss")
        }
    )


def summarize(comparison: Comparison) -> dict[str, Any]:
    """What ``summary.json`` of a comparison holds; safe for JSON (no NaN, no infinity).

    ``methods``: for each method ``seeds`` (those finished) and an `Estimate` for each of `metrics`.
    ``differences``: the same for each method minus ``baseline``, over the seeds that both have finished.
    ``personal``: the methods without a global model, each client of which keeps its own.
    ``settings``: ``common`` to all methods, and ``differing``: key -> method -> value.
    ``unfinished``: method, seed and finished rounds of every run that was asked for and has no summary.
    """
    by_method = {
        method: {seed: metrics(end) for seed, end in comparison.finished(method)} for method in comparison.methods
    }
    baseline, *others = by_method
    common, differing = partition_settings(
        {method: runs[0].config.to_flat() for method, runs in comparison.methods.items() if runs}
    )
    common.pop("seed", None)
    return {
        "baseline": baseline,
        "seeds": comparison.seeds,
        "methods": {method: _estimates(by_seed) for method, by_seed in by_method.items()},
        "differences": {
            method: _estimates(_paired_differences(by_method[method], by_method[baseline])) for method in others
        },
        "personal": [
            method for method in by_method if any(end.get("personal") for _, end in comparison.finished(method))
        ],
        "settings": {"common": common, "differing": differing},
        "unfinished": [
            {"method": method, "seed": seed, "rounds": comparison.rounds_done(method, seed)}
            for method, by_seed in by_method.items()
            for seed in comparison.seeds
            if seed not in by_seed
        ],
    }


def _paired_differences(
    ours: dict[int, dict[str, float | None]], theirs: dict[int, dict[str, float | None]]
) -> dict[int, dict[str, float | None]]:
    return {
        seed: {
            name: None if value is None or (other := theirs[seed].get(name)) is None else value - other
            for name, value in ours[seed].items()
        }
        for seed in ours
        if seed in theirs
    }


def _estimates(by_seed: dict[int, dict[str, float | None]]) -> dict[str, Any]:
    names = next(iter(by_seed.values()), {})
    return {"seeds": list(by_seed)} | {name: estimate([run[name] for run in by_seed.values()]) for name in names}


def partition_settings(
    settings: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(key -> value where all of `settings` agree, key -> owner -> value where they do not)."""
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    values = {key: {owner: flat.get(key) for owner, flat in settings.items()} for key in keys}
    first = {key: next(iter(by_owner.values())) for key, by_owner in values.items()}
    common = {key: first[key] for key in keys if all(value == first[key] for value in values[key].values())}
    return common, {key: values[key] for key in keys if key not in common}


def activity(runs: Sequence[Run]) -> dict[int, npt.NDArray[np.float64]]:
    """Round -> (L,) share of steps in which each of L gate groups was on, averaged over clients and runs."""
    shares: dict[int, list[npt.NDArray[np.float64]]] = {}
    for run in runs:
        for row in run.journal:
            shares.setdefault(row["round"], []).extend(
                np.asarray(client["active_steps"]) / client["steps"] for client in row["clients"]
            )
    return {number: np.mean(clients, axis=0) for number, clients in sorted(shares.items())}
