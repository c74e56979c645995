"""Records of a comparison: summary.json (`ComparisonSummary`)."""

from __future__ import annotations

from copra_fl.records.record import Record

ConfigValue = str | int | float | bool

#: with fewer seeds there is no interval and no verdict: two values hardly show how much results vary
MIN_SEEDS = 3


class Estimate(Record):
    """One metric over seeds.

    Attributes:
        mean: None if a seed has no finite value.
        interval: the 95 % t-interval of the mean; None also for fewer than `MIN_SEEDS` seeds.
        values: one per seed, in the order of `MetricEstimates.seeds`; None where the value is not finite.
    """

    mean: float | None
    interval: tuple[float, float] | None
    values: tuple[float | None, ...]


class MetricEstimates(Record, extra="allow"):
    """An `Estimate` of each of `reporting.statistics.metrics` over `seeds`; in JSON each metric is a key of its own.

    A metric that no seed has, such as perplexity in a classification, is left out.
    """

    __pydantic_extra__: dict[str, Estimate]
    seeds: tuple[int, ...]

    @property
    def metrics(self) -> dict[str, Estimate]:
        """Return metric -> estimate; empty before a seed has finished."""
        return self.__pydantic_extra__

    def get(self, metric: str) -> Estimate:
        """Return the estimate of `metric`, without a mean if it was not measured."""
        return self.metrics.get(metric, Estimate(mean=None, interval=None, values=()))


class ComparedSettings(Record):
    """Configurations of several methods.

    Attributes:
        common: key -> value, where all methods agree.
        differing: key -> method -> value; None for a method without that key.
    """

    common: dict[str, ConfigValue]
    differing: dict[str, dict[str, ConfigValue | None]]


class UnfinishedRun(Record):
    """A run of a comparison without a summary, and the number of its finished rounds."""

    method: str
    seed: int
    rounds: int


class EarlyEnd(Record):
    """A run of a comparison that ended in `round`, before num-rounds, and the reason."""

    method: str
    seed: int
    round: int
    reason: str


class Curve(Record):
    """Validation accuracy against cost: means over a method's seeds, in the rounds that all of them evaluated.

    Attributes:
        lowest, highest: over seeds.
        bytes_up, bytes, flops: up to and including the round: up, up and down, operations of the clients' training.
    """

    rounds: tuple[int, ...]
    accuracy: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    bytes_up: tuple[float, ...]
    bytes: tuple[float, ...]
    flops: tuple[float, ...] | None


class TargetCost(Record):
    """Cost of a method until its validation accuracy first reached a target: one value per seed, None if it did not.

    Attributes:
        targets: target-accuracy, or else the accuracy with which the baseline ended with the same seed.
    """

    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    rounds: tuple[int | None, ...]
    bytes_up: tuple[float | None, ...]
    bytes: tuple[float | None, ...]
    flops: tuple[float | None, ...]


class Verdict(Record):
    """Methods by the difference of their `metric` to the baseline's, each paired by seed.

    Attributes:
        metric: ``test_accuracy``, or ``validation_accuracy`` of runs without a final test.
        above, below: the 95 % interval of the difference excludes 0.
        level: it includes 0.
        too_few: fewer than `MIN_SEEDS` paired seeds.
        text: the same in sentences.
    """

    metric: str
    above: tuple[str, ...]
    below: tuple[str, ...]
    level: tuple[str, ...]
    too_few: tuple[str, ...]
    text: str


class ComparisonSummary(Record):
    """``summary.json`` of a comparison.

    Attributes:
        baseline: the method that the others are compared with.
        seeds: those asked for.
        methods: over the finished seeds of each method.
        differences: of each other method, its metrics minus the baseline's, over the seeds that both have finished.
        personal: methods with one model per client instead of a global model.
        settings: without the seed.
        ended_early: runs that ended before num-rounds.
        curves: of methods with finished and evaluated runs.
        to_target: the same methods; empty if the baseline was not evaluated.
        verdict: None in the files of earlier versions.
    """

    baseline: str
    seeds: tuple[int, ...]
    methods: dict[str, MetricEstimates]
    differences: dict[str, MetricEstimates]
    personal: tuple[str, ...]
    settings: ComparedSettings
    unfinished: tuple[UnfinishedRun, ...]
    ended_early: tuple[EarlyEnd, ...] = ()
    curves: dict[str, Curve] = {}
    to_target: dict[str, TargetCost] = {}
    verdict: Verdict | None = None
