"""`copra-fl probe merge`: merge trained adapters with each of PEFT's methods, and score them before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from copra_fl.adapters.state import Adapter
from copra_fl.probes import charts
from copra_fl.probes.findings import Findings, setting_facts, setting_line
from copra_fl.probes.members import Members
from copra_fl.probes.merging import MERGE_METHODS, merge
from copra_fl.probes.open_run import Metrics, Progress, Split, rank_of
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.html import Section
from copra_fl.reporting.tables import Column
from copra_fl.training.evaluation import merge_gap_each

ACCURACY = Column("accuracy, %", "accuracy", scale=100)
COLUMNS = (
    Column("loss", "loss", spec=".3f"),
    ACCURACY,
    Column("gap, points", "gap", scale=100, spec="+.1f"),
)


@dataclass(frozen=True)
class ScoredModel:
    """A model before or after merging, with its scores.

    With several data sets, `loss`, `accuracy` and `gap` are means over the data sets on which the model is evaluated.

    Attributes:
        name: a member, or a merge method.
        kind: PEFT's combination type; an en dash before merging.
        rank: largest rank of its modules.
        gap: accuracy minus the weighted mean accuracy of the members.
        interval: Wilson's 95 % interval of the accuracy; None with several data sets, and for examples with several
            targets, as the tokens of a text, which are not independent.
        datasets: with several data sets: metrics by data set; a client has its own, a merge those of all its members.
    """

    name: str
    kind: str
    rank: int
    loss: float
    accuracy: float
    gap: float
    interval: tuple[float, float] | None
    datasets: Mapping[str, Metrics]

    @property
    def facts(self) -> dict[str, Any]:
        """Name and scores as plain data."""
        return {name: value for name, value in vars(self).items() if name not in ("interval", "datasets") or value}


def probe(members: Members, split: Split, scale: float, density: float, seed: int, progress: Progress) -> Findings:
    """Score the members by themselves, and merged by each method that their factors allow."""
    adapters, mismatch, warnings = members.plain_adapters, members.factor_mismatch, []
    methods = {name: method for name, method in MERGE_METHODS.items() if not (method.of_factors and mismatch)}
    if mismatch:
        warnings.append(f"Merges of factors are left out: {mismatch}.")
    member_metrics: list[Metrics] = []
    data, indices = members.runs[0].data, members.runs[0].indices(split)
    num_examples = len(indices)
    is_binomial = not data.datasets and bool((data.examples.num_targets[indices] == 1).all())
    for member, adapter in enumerate(adapters):
        member_metrics += members.score_plain([member], [adapter], split)
        progress("before", 1, len(adapters))

    def scored(name: str, kind: str, adapter: Adapter, metrics: Metrics) -> ScoredModel:
        gap = merge_gap_each(metrics, member_metrics, members.weights)["accuracy"]
        accuracy, datasets = metrics["accuracy"], metrics.get("datasets", {})
        interval = wilson_interval(accuracy, num_examples) if is_binomial else None
        return ScoredModel(name, kind, rank_of(adapter), metrics["loss"], accuracy, gap, interval, datasets)

    before = [
        scored(name, "–", adapter, metrics)
        for name, adapter, metrics in zip(members.names, adapters, member_metrics, strict=True)
    ]
    merged = []
    for name, method in methods.items():
        adapter = merge(adapters, method, members.weights, scale, density, seed)
        (metrics,) = members.score_plain(range(len(adapters)), [adapter], split)
        merged.append(scored(name, method.kind, adapter, metrics))
        progress("merged", 1, len(methods))
    setting = setting_line(
        members.runs,
        split,
        members.description,
        f"task arithmetic: scale {scale:g}",
        f"TIES and DARE: density {density:g}",
        f"DARE: seed {seed}",
    )
    mean = merged[0].accuracy - merged[0].gap
    return Findings(
        probe="merge",
        title=f"Merging {members.description}",
        setting=setting,
        verdict=_verdict(merged, mean, num_examples),
        results=_results(before, merged),
        facts=setting_facts(members.runs, split)
        | {"scale": scale, "density": density, "merge_seed": seed, "weights": list(members.weights)}
        | {"before": [model.facts for model in before], "mean_accuracy_before": mean}
        | {"merged": [model.facts for model in merged]},
        sections=[Section("Before and after", charts.merges(_scores(before), _scores(merged), mean, setting))],
        warnings=warnings,
    )


def wilson_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy that was measured on `num_examples`."""
    low, high = binomtest(round(accuracy * num_examples), num_examples).proportion_ci(method="wilson")
    return float(low), float(high)


def _scores(models: Sequence[ScoredModel]) -> dict[str, tuple[float, float, float]]:
    """Return name -> accuracy and the ends of its interval; without an interval, both ends are the accuracy."""
    return {model.name: (model.accuracy, *(model.interval or (model.accuracy, model.accuracy))) for model in models}


def _verdict(merged: Sequence[ScoredModel], mean: float, examples: int) -> str:
    """Return the best merge in one sentence, with the interval of its accuracy if there is one."""
    best = max(merged, key=lambda model: model.accuracy)
    evidence = ""
    if best.interval:
        low, high = best.interval
        evidence = f"; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        if low <= mean <= high:
            evidence += ", which includes the mean before merging: too few examples to tell them apart"
    return (
        f"The mean accuracy before merging is {100 * mean:.1f} %. The best of {len(merged)} merges on these {examples} "
        f"examples is {best.name}, with {100 * best.accuracy:.1f} % ({100 * best.gap:+.1f} points{evidence})."
    ).replace("(-", "(−")


def _results(before: Sequence[ScoredModel], merged: Sequence[ScoredModel]) -> DataTable:
    names = list(merged[0].datasets)
    caption = (
        "PEFT: its combination type. Gap: accuracy minus the mean accuracy before merging, weighted as in the merge. "
        "Clients are weighted by their training examples, or equally if their run does so; runs and rounds equally. "
        "Heads are averaged."
    )
    if names:
        caption += (
            " A client is evaluated on its own data set, a merge on the data sets of all its clients; loss, accuracy "
            "and gap are means over data sets. In the head, the rows of a data set are averaged over its own clients."
        )

    def cells(model: ScoredModel) -> list[str]:
        by_dataset = [model.datasets[name]["accuracy"] if name in model.datasets else None for name in names]
        return [
            *(column.format(getattr(model, column.metric)) for column in COLUMNS),
            *(ACCURACY.format(accuracy) for accuracy in by_dataset),
        ]

    return DataTable(
        ["model", "PEFT", "rank", *(column.heading for column in COLUMNS), *(f"{name}, %" for name in names)],
        [[model.name, model.kind, str(model.rank), *cells(model)] for model in (*before, *merged)],
        caption,
    )
