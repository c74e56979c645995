"""A run's adapter as it is exported, and the coalition game of its parts: for Shapley values and pruning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from copra_fl.adapters.residual import fold
from copra_fl.adapters.state import Adapter, parts
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split
from copra_fl.probes.pruned_adapters import keep
from copra_fl.probes.shapley_values import (
    MAX_EXACT,
    CharacteristicFunction,
    Floats,
    ShapleyValues,
    exact,
    from_orders,
    sample,
)
from copra_fl.reporting.results import ResultsError
from copra_fl.seeding import generator

#: number of adapters that are evaluated together
ADAPTERS_AT_ONCE = 16
METRICS = ("accuracy", "loss")


@dataclass(frozen=True)
class ExportedAdapter:
    """Everything that a run has trained, as one adapter: a residual of W0 is folded into it."""

    run: OpenRun

    @cached_property
    def adapter(self) -> Adapter:
        run = self.run
        if not run.residual:
            return run.adapter
        return fold(run.adapter, run.residual, run.scaling) | parts(run.adapter, {"head"})

    def score(
        self, adapters: Sequence[Adapter], split: Split, step: str, progress: Progress, num_scored: int = 0
    ) -> list[Metrics]:
        """Return loss and accuracy of each of `adapters`, which are parts of this one.

        `num_scored` adapters of the same `step` have been scored before; they count in the total of `progress`.
        """
        score = self.run.score_plain if self.run.residual else self.run.score
        metrics: list[Metrics] = []
        for start in range(0, len(adapters), ADAPTERS_AT_ONCE):
            group = adapters[start : start + ADAPTERS_AT_ONCE]
            metrics += score(group, split)
            progress(f"{self.run.name}: {step}", len(group), num_scored + len(adapters))
        return metrics


def export_runs(runs: Sequence[OpenRun]) -> list[ExportedAdapter]:
    """Return the exported adapter of each run. Raises ResultsError for two runs of one name."""
    names = [run.name for run in runs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ResultsError(f"several runs are called {repeated}: rename a folder, since results are listed by its name")
    return [ExportedAdapter(run) for run in runs]


@dataclass(frozen=True)
class Game:
    """A coalition game: its players are groups of adapted modules, its value is a metric with only a coalition active.

    No coalition is evaluated twice.

    Attributes:
        exported: the adapter whose modules are switched.
        players: the module names of each player.
        split: the held-out examples that are evaluated.
    """

    exported: ExportedAdapter
    players: Sequence[Collection[str]]
    split: Split
    progress: Progress
    _metrics: dict[bytes, Metrics] = field(default_factory=dict, init=False)

    def value(self, metric: str) -> CharacteristicFunction:
        """Return the characteristic function v: accuracy, or minus loss, so that more is better."""
        sign = -1 if metric == "loss" else 1

        def value(coalitions: np.ndarray) -> Floats:
            new = [row for row in coalitions if row.tobytes() not in self._metrics]
            adapters = [keep(self.exported.adapter, self._modules(row)) for row in new]
            step = f"coalitions of {len(self.players)}"
            scored = self.exported.score(adapters, self.split, step, self.progress, num_scored=len(self._metrics))
            self._metrics.update((row.tobytes(), metrics) for row, metrics in zip(new, scored, strict=True))
            return np.array([sign * self._metrics[row.tobytes()][metric] for row in coalitions])

        return value

    def _modules(self, coalition: np.ndarray) -> set[str]:
        return {module for player, inside in zip(self.players, coalition, strict=True) if inside for module in player}


def solve(game: Game, standard_error: float, max_pairs: int, seed: int) -> dict[str, ShapleyValues]:
    """Return the Shapley values of `game` by metric.

    With more than `MAX_EXACT` players, orders are sampled until the standard errors of accuracy are at most
    `standard_error`. The same orders serve the loss, and all runs with as many players, so that their differences have
    less noise.
    """
    num_players = len(game.players)
    if num_players <= MAX_EXACT:
        return {metric: exact(game.value(metric), num_players) for metric in METRICS}
    stream = generator(seed, "shapley", num_players)
    accuracy = sample(game.value("accuracy"), num_players, stream, standard_error, max_pairs)
    return {"accuracy": accuracy, "loss": from_orders(game.value("loss"), accuracy.orders)}
