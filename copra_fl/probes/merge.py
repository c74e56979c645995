"""What becomes of adapters that are merged after training, in all the usual ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copra_fl.adapters.state import Adapter, parts
from copra_fl.probes import charts
from copra_fl.probes.findings import Findings, origin, setting
from copra_fl.probes.members import Members
from copra_fl.probes.merging import MERGES, merge
from copra_fl.probes.open_run import Metrics, Progress, Split
from copra_fl.reporting.html import DataTable, Section
from copra_fl.reporting.tables import Column
from copra_fl.training.evaluation import merge_gap_each

ACCURACY = Column("accuracy, %", "accuracy", scale=100)
COLUMNS = (
    Column("loss", "loss", spec=".3f"),
    ACCURACY,
    Column("to the mean, points", "gap", scale=100, spec="+.1f"),
)


@dataclass(frozen=True)
class Row:
    """A model before or after merging. `gap`: its accuracy minus the weighted mean of those before.

    With several data sets `datasets` has what it is evaluated on, each with its metrics: for a client its own, for a
    merge those of its members. Loss, accuracy and gap are means over these.
    """

    name: str
    kind: str
    rank: int
    loss: float
    accuracy: float
    gap: float
    datasets: Mapping[str, Metrics]

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {name: value for name, value in vars(self).items() if name != "datasets" or value}


def probe(members: Members, split: Split, scale: float, density: float, seed: int, progress: Progress) -> Findings:
    """The members by themselves, and merged in each way that they can be."""
    adapters, scorer = members.plain(split)
    factors_differ, warnings = members.factors_differ, []
    ways = {name: how for name, how in MERGES.items() if not (how.of_factors and factors_differ)}
    if factors_differ:
        warnings.append(f"No merge of factors apart: {factors_differ}.")
    before: list[Metrics] = []
    for member, adapter in enumerate(adapters):
        before += scorer([member])([adapter])
        progress("before", 1, len(adapters))

    def row(name: str, kind: str, adapter: Adapter, metrics: Metrics) -> Row:
        rank = max(len(tensor) for tensor in parts(adapter, {"A"}).values())
        gap = merge_gap_each(metrics, before, members.weights)["accuracy"]
        return Row(name, kind, rank, metrics["loss"], metrics["accuracy"], gap, metrics.get("datasets", {}))

    own = [row(*each) for each in zip(members.names, ["–"] * len(before), adapters, before, strict=True)]
    merged, score = [], scorer(range(len(adapters)))
    for name, how in ways.items():
        adapter = merge(adapters, how, members.weights, scale, density, seed)
        merged.append(row(name, how.kind, adapter, score([adapter])[0]))
        progress("merged", 1, len(ways))
    told = setting(
        members.runs, split, members.what, f"task arithmetic: scale {scale:g}", f"TIES and DARE: density {density:g}",
        f"DARE: seed {seed}",
    )  # fmt: skip
    mean = merged[0].accuracy - merged[0].gap
    return Findings(
        probe="merge",
        title=f"Merging {members.what}",
        setting=told,
        verdict=_verdict(merged, mean),
        results=_results(own, merged),
        facts=origin(members.runs, split)
        | {"scale": scale, "density": density, "merge_seed": seed, "weights": list(members.weights)}
        | {"before": [each.facts for each in own], "mean_accuracy_before": mean}
        | {"merged": [each.facts for each in merged]},
        sections=[Section("Before and after", charts.merges(_accuracies(own), _accuracies(merged), mean, told))],
        warnings=warnings,
    )


def _accuracies(rows: Sequence[Row]) -> dict[str, float]:
    return {row.name: row.accuracy for row in rows}


def _verdict(merged: Sequence[Row], mean: float) -> str:
    best = max(merged, key=lambda row: row.accuracy)
    return (
        f"Before, accuracy is {100 * mean:.1f} % in the mean. The best of {len(merged)} merges on these examples is "
        f"{best.name}, with {100 * best.accuracy:.1f} % ({100 * best.gap:+.1f} points)."
    ).replace("(-", "(−")


def _results(own: Sequence[Row], merged: Sequence[Row]) -> DataTable:
    names = list(merged[0].datasets)
    caption = (
        "PEFT: its combination type. To the mean: accuracy minus the mean of those before, weighted as in the merge: "
        "by training examples for clients, unless their run weighs them alike, else alike. Heads are averaged."
    )
    if names:
        caption += (
            " A client is evaluated on its own data set, a merge on those of all clients; loss, accuracy and "
            "distance to the mean are means over data sets, and a data set's rows of the head its own clients' alone."
        )

    def cells(row: Row) -> list[str]:
        each = [row.datasets[name]["accuracy"] if name in row.datasets else None for name in names]
        return [
            *(column.format(getattr(row, column.metric)) for column in COLUMNS),
            *(ACCURACY.format(value) for value in each),
        ]

    return DataTable(
        ["model", "PEFT", "rank", *(column.heading for column in COLUMNS), *(f"{name}, %" for name in names)],
        [[row.name, row.kind, str(row.rank), *cells(row)] for row in (*own, *merged)],
        caption,
    )
