"""Table of the merges of two federations, with intervals over pairs of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copra_fl.records import Estimate
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.tables import POINTS, TEST_ACCURACY
from experiments.papers_summary import pseudo_values

#: names in `probes.merging.MERGE_METHODS`
MERGES = FACTORS, PRODUCTS = "average of factors", "average of products"
HEADER = ("split", "method", "alone, %", "gap of factors, points", "gap of products, points")


def table(results: Sequence[Mapping[str, Any]]) -> DataTable:
    """Return the accuracy of federations alone and the gaps of merges of two: one row per split and method.

    The last column is the gap of factors minus that of the first method, paired by the two seeds.
    """
    rows = []
    for facts in results:
        rival, *_ = facts["measured"]
        for method, measured in facts["measured"].items():
            alone = estimate([metrics["accuracy"] for metrics in measured["alone"]])
            ours, theirs = gaps(measured, FACTORS), gaps(facts["measured"][rival], FACTORS)
            differences = over_pairs({pair: ours[pair] - theirs[pair] for pair in ours})
            shown = [POINTS.show(over_pairs(gaps(measured, merge))) for merge in (FACTORS, PRODUCTS)]
            against = "" if method == rival else POINTS.show(differences)
            rows.append([facts["split"], method, TEST_ACCURACY.show(alone), *shown, against])
    return DataTable([*HEADER, f"factors minus {rival}'s, points"], rows)


def gaps(measured: Mapping[str, Any], merge: str) -> dict[tuple[int, int], float]:
    """Return pair of runs -> test accuracy of their merge minus the mean of the two alone."""
    alone = [metrics["accuracy"] for metrics in measured["alone"]]
    by_pair = {tuple(pair["members"]): pair[merge]["accuracy"] for pair in measured["pairs"]}
    return {(i, j): accuracy - (alone[i] + alone[j]) / 2 for (i, j), accuracy in by_pair.items()}


def over_pairs(value_of: Mapping[tuple[int, int], float]) -> Estimate:
    """Return the mean of a value of each pair of runs, with the 95 % t-interval of the jackknife over runs.

    Pairs that have a run in common are not independent. So the interval is that of Tukey's pseudo-values, one for each
    run (Arvesen, 1969, Annals of Mathematical Statistics 40, for U-statistics).
    """
    return estimate(pseudo_values(value_of, sorted({run for pair in value_of for run in pair})))
