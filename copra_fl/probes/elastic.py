"""Elastic score: the mean accuracy of one adapter over devices that keep different shares of its layers or its rank.

    layers   mean over the shares 1, 3/4, 1/2 and 1/4 of the mean over random subsets with that share of the layers
    rank     mean over the same shares of the accuracy with the first components of the rank

All subsets of a size are evaluated if they are few, else a random sample of distinct ones. The 95 % interval of a mean
over n of N subsets is Student's, times sqrt(1 - n / N), since the sample is drawn without replacement: it has no width
if all subsets were evaluated. It covers the choice of subsets, not the seed of the run.

CoTo (arXiv 2506.05713) prunes layers of one adapter. Prefixes of the rank are those of PreLort (arXiv 2606.15963),
whose training orders the components.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np

from copra_fl.probes.exported import Game
from copra_fl.probes.pruned_adapters import SHARES, size_of
from copra_fl.reporting import statistics
from copra_fl.seeding import generator


@dataclass(frozen=True)
class Mean:
    """A mean; its 95 % interval is `value` plus and minus `half_width`. NaN if a value is not finite."""

    value: float
    half_width: float


@dataclass(frozen=True)
class SubsetScores:
    """The metrics of an adapter with each of several subsets of `size` of its `num_layers` layers.

    Attributes:
        metrics: metric -> its value with each subset.
    """

    size: int
    num_layers: int
    metrics: dict[str, list[float]]

    @property
    def num_subsets(self) -> int:
        """Number of subsets that were evaluated."""
        return len(next(iter(self.metrics.values())))

    @property
    def num_possible(self) -> int:
        """Number of all subsets of this size."""
        return math.comb(self.num_layers, self.size)

    def mean(self, metric: str) -> Mean:
        """Return the mean of `metric` over all subsets of this size."""
        return mean_over_subsets(self.metrics[metric], self.num_possible)


def subsets(num_layers: int, size: int, max_subsets: int, stream: np.random.Generator) -> np.ndarray:
    """Return subsets of `size` layers as (n, num_layers) bool: all of them, or `max_subsets` distinct random ones."""
    if math.comb(num_layers, size) <= max_subsets:
        chosen = list(combinations(range(num_layers), size))
    else:
        drawn: dict[tuple[int, ...], None] = {}
        while len(drawn) < max_subsets:
            drawn[tuple(sorted(stream.choice(num_layers, size, replace=False).tolist()))] = None
        chosen = list(drawn)
    is_kept = np.zeros((len(chosen), num_layers), dtype=bool)
    np.put_along_axis(is_kept, np.array(chosen), True, axis=1)
    return is_kept


def score_subsets(game: Game, metrics: Sequence[str], max_subsets: int, seed: int) -> list[SubsetScores]:
    """Score subsets of the layers, the players of `game`, for each of `SHARES`, largest first.

    Runs with as many layers are scored on the same subsets.
    """
    number = len(game.players)
    sizes = dict.fromkeys(size_of(share, number) for share in SHARES)
    kept = {size: subsets(number, size, max_subsets, generator(seed, "elastic", number, size)) for size in sizes}
    ends = np.cumsum([len(rows) for rows in kept.values()])[:-1]
    values: dict[str, list[np.ndarray]] = {}
    for metric in metrics:
        sign = -1 if metric == "loss" else 1  # the value of a game is minus the loss
        values[metric] = np.split(sign * game.value(metric)(np.concatenate(list(kept.values()))), ends)
    return [
        SubsetScores(size, number, {metric: values[metric][index].tolist() for metric in metrics})
        for index, size in enumerate(sizes)
    ]


def mean_over_subsets(values: Sequence[float], num_possible: int) -> Mean:
    """Return the mean over all `num_possible` subsets of a size, of which `values` are a random sample.

    >>> round(mean_over_subsets([1.0, 2.0, 3.0], 12).half_width, 3)  # 4.3027 * 1 / sqrt(3) * sqrt(1 - 3 / 12)
    2.151
    """
    if not all(map(math.isfinite, values)):
        return Mean(math.nan, math.nan)
    half_width = statistics.half_width(values) if len(values) > 1 else 0.0
    return Mean(fmean(values), half_width * math.sqrt(1 - len(values) / num_possible))


def layer_score(scores: Sequence[SubsetScores], metric: str) -> Mean:
    """Return the mean of `metric` over `SHARES`; the half-widths of the shares add up as independent errors do."""
    weights = Counter(size_of(share, scores[0].num_layers) for share in SHARES)
    means = {score.size: score.mean(metric) for score in scores}
    return Mean(
        sum(weights[size] * mean.value for size, mean in means.items()) / len(SHARES),
        math.hypot(*(weights[size] * mean.half_width for size, mean in means.items())) / len(SHARES),
    )


def rank_score(value_by_size: Mapping[int, float], rank: int) -> float:
    """Return the mean over `SHARES` of the value with that share of the rank."""
    return fmean(value_by_size[size_of(share, rank)] for share in SHARES)
