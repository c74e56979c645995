"""Means and intervals of the measures of `papers.py`, and their table with the published numbers.

Pairs and triples of seeds are not independent, so the intervals come from the jackknife over seeds. For n seeds, with m
the mean over all groups and m_-s the mean over the groups without seed s, the pseudo-values n m - (n-1) m_-s are used
as one value per seed. Their mean is m; for measures of single adapters they are the values of the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from copra_fl.records import Estimate
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.tables import Column
from copra_fl.wording import join_words

#: measure -> seeds of the adapters -> value
Values = dict[str, dict[tuple[int, ...], float]]
#: measure -> published values, LoRA -> CopRA or CoTo, of other models and data
PUBLISHED = {
    "alone": "one task: −0.94 on GLUE's average",
    "factor path: accuracy at the midpoint": "39 → 79 (commonsense reasoning); 65.60 → 72.03 (DTD), "
    "81.48 → 86.69 (UCF101), merged one to one",
    "merge of 3: average of factors": "59.6 → 69.7 (DTD)",
    "kept: every other layer": "63.30 → 71.11 (DTD), 79.25 → 85.38 (UCF101)",
    "Shapley: share of the uppermost third": "69 in the top 4 of 12 layers → balanced to about ±8",
}
#: words in the names of measures that are not shown in %
UNSCALED = ("barrier", "loss", "Gini")


def pseudo_values(values: Mapping[tuple[int, ...], float], seeds: Sequence[int]) -> list[float]:
    """Return the jackknife's pseudo-values, one per seed; only the mean if a seed is in all groups.

    >>> pseudo_values({(0,): 1.0, (1,): 2.0, (2,): 6.0}, (0, 1, 2))
    [1.0, 2.0, 6.0]
    """
    number, mean = len(seeds), fmean(values.values())
    without = [[value for group, value in values.items() if seed not in group] for seed in seeds]
    return [number * mean - (number - 1) * fmean(rest) for rest in without] if all(without) else [mean]


def summarise(measured: Mapping[str, Values], seeds: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the estimates of each measure: ``lora``, ``copra``, and their ``difference`` paired by seed."""
    summary = {}
    for name in measured["lora"]:
        lora, copra = (pseudo_values(measured[method][name], seeds) for method in ("lora", "copra"))
        difference = [ours - theirs for ours, theirs in zip(copra, lora, strict=True)]
        by = {"lora": lora, "copra": copra, "difference": difference}
        summary[name] = {what: estimate(values).model_dump() for what, values in by.items()}
    return summary


def table(facts: Mapping[str, Any]) -> str:
    """Return the results as Markdown: the settings, the choice of learning rates, all measures."""
    config, examples, methods = facts["settings"], facts["examples"], list(facts["rates"])
    lines = [
        "# The papers' experiments, outside a federation",
        "",
        f"`{facts['command']}`; all numbers: papers-{facts['date']}.json. {config['model']}, {config['dataset']}, rank "
        f"{config['rank']} on {config['target-modules']}, {config['local-steps']} steps of {config['batch-size']} by "
        f"Trainer, base in {config['dtype']}; {examples['test']} test texts. "
        f"Seeds {join_words(facts['seeds'])}; "
        "each has its own start of adapter and head and its own order of the data.",
        "",
        f"Accuracy on {examples['validation']} validation texts, %, seeds {join_words(facts['tuning_seeds'])}:",
        "",
        f"| rate | {' | '.join(methods)} |",
        "|---|---|---|",
    ]
    for rate in facts["tuning"][methods[0]]:
        means = {method: f"{100 * fmean(facts['tuning'][method][rate]):.1f}" for method in methods}
        cells = [f"**{mean}**" if facts["rates"][method] == float(rate) else mean for method, mean in means.items()]
        lines.append(f"| {rate} | {' | '.join(cells)} |")
    lines += [
        "",
        "Mean [95 % interval] in % and points; losses, barriers and Gini without unit. Intervals: jackknife over "
        "seeds. Difference: copra − lora, paired by seed. Gap: accuracy minus the mean accuracy of the merged "
        "adapters. Published: on other models and data.",
        "",
        "| measure | lora | copra | difference | published |",
        "|---|---|---|---|---|",
    ]
    for name, estimates in facts["measures"].items():
        cells = [
            column(name, "+" if kind == "difference" else "").show(Estimate(**measured))
            for kind, measured in estimates.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {PUBLISHED.get(name, '')} |")
    return "\n".join(lines) + "\n"


def column(measure: str, sign: str = "") -> Column:
    """Return the format of a measure; `sign` is ``+`` for differences."""
    scale, spec = (1, ".3f") if any(word in measure for word in UNSCALED) else (100, ".1f")
    return Column(measure, measure, scale, sign + spec)
