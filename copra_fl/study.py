"""A study: a grid of comparisons, each method at the learning rate that is best for it on validation data.

A cell of the grid is one split in one regime (rounds x local steps). In its folder are two comparisons: ``rates``,
every method at every learning rate on tuning seeds, of which only validation data counts, and ``test``, every method at
the rate chosen, on other seeds. `results` is all that a report or a document needs of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from copra_fl import provenance
from copra_fl.config import Config
from copra_fl.results import Comparison, estimate, load_comparison, metrics, summarise, write_text

RATES, TEST = "rates", "test"


def rate_key(config: Config) -> str:
    """The learning rate that is chosen: of the adapters, or of the head where it is trained alone."""
    return "head-learning-rate" if config.copra.local_training == "head" else "learning-rate"


def tuned_name(method: str, rate: float) -> str:
    """What a method at one learning rate is called in ``rates``.

    >>> tuned_name("lora", 0.005)
    'lora@0.005'
    """
    return f"{method}@{rate:g}"


def rates_to_try(grid: Sequence[float], tried: Mapping[float, float]) -> list[float]:
    """The rates of `grid` that a method must try next, given the accuracies of those it has `tried`.

    It begins with the middle three and goes on until the best and both its neighbours have been tried. The same search
    for every method, it spends nothing on rates far from the best and does not stop where a better one lies beside it.

    >>> rates_to_try([1, 2, 5, 10, 20], {}), rates_to_try([1, 2, 5, 10, 20], {2: 0.3, 5: 0.4, 10: 0.5})
    ([2, 5, 10], [20])
    """
    grid = sorted(grid)
    centre = grid.index(best_rate(tried)) if tried else len(grid) // 2
    return [rate for rate in grid[max(0, centre - 1) : centre + 2] if rate not in tried]


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the highest accuracy; of equals the lowest."""
    return max(sorted(tried), key=tried.__getitem__)


def validation_accuracies(tuning: Comparison) -> dict[str, dict[float, float]]:
    """Method -> learning rate -> mean validation accuracy after the last round, where all runs have finished."""
    found: dict[str, dict[float, float]] = {}
    for name in tuning.methods:
        values = [metrics(end)["validation_accuracy"] for _, end in tuning.finished(name)]
        method, _, rate = name.rpartition("@")
        if len(values) == len(tuning.seeds) and (mean := estimate(values)["mean"]) is not None:
            found.setdefault(method, {})[float(rate)] = mean
    return found


def cell_results(cell: Path) -> dict[str, Any]:
    """``split``, ``regime``, the ``rates`` chosen, and the test as `results.summarise` gives it."""
    tuning, test = load_comparison(cell / RATES), summarise(load_comparison(cell / TEST))
    return {
        "split": cell.parent.name,
        "regime": cell.name,
        "tuning_seeds": tuning.seeds,
        "rates": {
            method: {
                "chosen": best_rate(tried),
                "validation_accuracy": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
            }
            for method, tried in validation_accuracies(tuning).items()
        },
        **test,
    }


def paired_difference(cell: Mapping[str, Any], method: str, other: str, metric: str = "test_accuracy") -> Any:
    """`results.Estimate` of `method` minus `other` over the seeds that both have finished."""
    ours, theirs = (
        dict(zip(found["seeds"], found[metric]["values"], strict=True))
        for found in (cell["methods"][method], cell["methods"][other])
    )
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return estimate([None if None in pair else pair[0] - pair[1] for pair in pairs])


def results(cells: Sequence[Path], command: str) -> dict[str, Any]:
    """What ``results.json`` of a grid holds: everything that a report or a document needs of its runs."""
    return {
        "command": command,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "cells": [cell_results(cell) for cell in cells],
    }


def write(directory: Path, cells: Sequence[Path], command: str) -> Path:
    """Write ``results.json`` of the grid in `directory`. Returns its path."""
    path = directory / "results.json"
    write_text(path, json.dumps(results(cells, command), indent=2, allow_nan=False) + "\n")
    return path
