"""A run's adapter as it is exported, and what parts of it reach: what Shapley values and pruning are about."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from copra_fl.adapters.residual import fold
from copra_fl.adapters.state import Adapter, parts
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split
from copra_fl.probes.pruned_adapters import keep
from copra_fl.probes.shapley_values import MAX_EXACT, Floats, Shapley, Value, exact, from_orders, sample
from copra_fl.reporting.results import ResultsError
from copra_fl.seeding import generator

#: adapters that are evaluated together
AT_ONCE = 16
METRICS = ("accuracy", "loss")


def wholes(runs: Sequence[OpenRun]) -> list[Whole]:
    """The whole of each run. Raises ResultsError where two have one name, by which results go."""
    names = [run.name for run in runs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ResultsError(f"several runs are called {repeated}: results go by the names of folders")
    return [Whole(run) for run in runs]


@dataclass(frozen=True)
class Whole:
    """All that a run has trained, as one adapter: what aggregation has added to W0 is folded into it."""

    run: OpenRun

    @cached_property
    def adapter(self) -> Adapter:
        run = self.run
        if not run.residual:
            return run.adapter
        return fold(run.adapter, run.residual, run.scaling) | parts(run.adapter, {"head"})

    def score(
        self, adapters: Sequence[Adapter], split: Split, what: str, progress: Progress, before: int = 0
    ) -> list[Metrics]:
        """Loss and accuracy of each of `adapters`, which are parts of this one, when `before` have been scored."""
        score = self.run.score_plain if self.run.residual else self.run.score
        found: list[Metrics] = []
        for start in range(0, len(adapters), AT_ONCE):
            some = adapters[start : start + AT_ONCE]
            found += score(some, split)
            progress(f"{self.run.name}: {what}", len(some), before + len(adapters))
        return found


@dataclass(frozen=True)
class Game:
    """Coalitions of `players`, each player the modules that are on where it is in. None is evaluated twice."""

    whole: Whole
    players: Sequence[Collection[str]]
    split: Split
    progress: Progress
    _known: dict[bytes, Metrics] = field(default_factory=dict)

    def value(self, metric: str) -> Value:
        """v: accuracy, or minus loss, so that more is better."""
        sign = -1 if metric == "loss" else 1

        def value(coalitions: np.ndarray) -> Floats:
            new = [row for row in coalitions if row.tobytes() not in self._known]
            adapters = [keep(self.whole.adapter, self._modules(row)) for row in new]
            what = f"coalitions of {len(self.players)}"
            scored = self.whole.score(adapters, self.split, what, self.progress, before=len(self._known))
            self._known.update((row.tobytes(), metrics) for row, metrics in zip(new, scored, strict=True))
            return np.array([sign * self._known[row.tobytes()][metric] for row in coalitions])

        return value

    def _modules(self, coalition: np.ndarray) -> set[str]:
        return {module for player, inside in zip(self.players, coalition, strict=True) if inside for module in player}


def solve(game: Game, standard_error: float, max_pairs: int, seed: int) -> dict[str, Shapley]:
    """Shapley values by metric. Where they are sampled, until accuracy's errors are `standard_error` at most.

    Loss has the same orders, and so have all runs with as many players: their differences have less noise.
    """
    players = len(game.players)
    if players <= MAX_EXACT:
        return {metric: exact(game.value(metric), players) for metric in METRICS}
    stream = generator(seed, "shapley", players)
    accuracy = sample(game.value("accuracy"), players, stream, standard_error, max_pairs)
    return {"accuracy": accuracy, "loss": from_orders(game.value("loss"), accuracy.orders)}
