"""The verdict of a comparison: which methods differ significantly from the baseline, and the same in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from copra_fl.records import MIN_SEEDS, ComparisonSummary, Verdict
from copra_fl.reporting.tables import (
    CLIENT_ACCURACY,
    POINTS,
    Column,
    compared_by,
    has_many_methods,
    ordered,
    significant,
)
from copra_fl.wording import join_words


def verdict(summary: ComparisonSummary) -> Verdict:
    """Return what the accuracies of `compared_by` show: for terminal, page, ``summary.json`` and Python.

    A method without that accuracy, or without a seed that the baseline has too, is in no group.
    """
    lead = compared_by(summary)
    above, below = significant(summary)
    others = [
        method
        for method, differences in summary.differences.items()
        if differences.get(lead.metric).mean is not None and method not in (*above, *below)
    ]
    groups = Verdict(
        metric=lead.metric,
        above=above,
        below=below,
        level=tuple(method for method in others if len(summary.differences[method].seeds) >= MIN_SEEDS),
        too_few=tuple(method for method in others if len(summary.differences[method].seeds) < MIN_SEEDS),
        text="",
    )
    return groups.model_copy(update={"text": _in_words(summary, groups)})


def _in_words(summary: ComparisonSummary, groups: Verdict) -> str:
    if has_many_methods(summary):
        return " ".join(_on_many(summary, groups))
    if not summary.differences:
        return _on_one(summary, summary.baseline)
    (method,) = summary.differences
    return _on_two(summary, method)


def _on_one(summary: ComparisonSummary, method: str) -> str:
    estimates = summary.methods[method]
    if not estimates.seeds:
        return f"{method} has not finished yet; the charts by round show its progress."
    if method in summary.personal:
        accuracy = CLIENT_ACCURACY.show(estimates.get("client_accuracy"))
        return (
            f"With {method} each client keeps its own model, so there is no global model to test; on the clients' own "
            f"validation data these models reach an accuracy of {accuracy} %."
        )
    lead = compared_by(summary)
    return f"{method} reaches a {name_of(lead)} of {lead.show(estimates.get(lead.metric))} %."


def _on_two(summary: ComparisonSummary, method: str) -> str:
    baseline, differences, lead = summary.baseline, summary.differences[method], compared_by(summary)
    if not differences.seeds:
        return f"{method} cannot be compared with {baseline} yet: no seed has finished with both."
    mean, interval = differences.get(lead.metric).mean, differences.get(lead.metric).interval
    if mean is None:
        results = " ".join(_on_one(summary, name) for name in (baseline, method))
        return f"{results} The two can only be compared on the clients' own data."
    points = f"{100 * abs(mean):.1f} points {'below' if mean < 0 else 'above'}" if mean else "level with"
    result = f"{method} ends {points} {baseline} in {name_of(lead)}"
    if interval is None:
        return f"Too few seeds to tell: {result} ({_paired(len(differences.seeds))}); run {MIN_SEEDS} or more."
    low, high = map(POINTS.format, interval)
    evidence = f"95 % interval {low} to {high} points, {_paired(len(differences.seeds))}"
    if interval[0] <= 0 <= interval[1]:
        return f"No significant difference: {result}, but the interval includes 0 ({evidence})."
    return f"{result} ({evidence})."


def _on_many(summary: ComparisonSummary, groups: Verdict) -> Iterator[str]:
    baseline, methods, lead = summary.baseline, summary.methods, compared_by(summary)
    first = ordered(summary)[0]
    mean = methods[first].get(lead.metric).mean
    if mean is None and methods.keys() - set(summary.personal):
        yield "No method has a test accuracy yet; the charts by round show their progress."
    if first in groups.above or (groups.below and not (groups.above or groups.level or groups.too_few)):
        yield f"{first} has the highest {name_of(lead)} of {len(methods)} methods, {lead.format(mean)} %."
    if groups.too_few:
        is_all = len(groups.too_few) == len(summary.differences)
        few = "methods" if is_all and len(groups.too_few) > 1 else join_words(groups.too_few)
        differ = "differs" if len(groups.too_few) == 1 else "differ"
        seeds = max(len(summary.differences[method].seeds) for method in groups.too_few)
        question = f"whether {few} {differ} from {baseline}"
        yield f"Too few seeds to tell {question}: {_paired(seeds)}; run {MIN_SEEDS} or more."
    if groups.above:
        yield _significant("above", baseline, groups.above)
    if groups.below:
        yield _significant("below", baseline, groups.below)
    if groups.level and not (groups.above or groups.below):
        yield f"No method differs significantly from {baseline}: all 95 % intervals of the differences include 0."
    elif groups.level:
        others = "other does" if len(groups.level) == 1 else "others do"
        yield f"{len(groups.level)} {others} not differ significantly from {baseline}."
    if len(groups.above + groups.below + groups.level) >= 10 and (groups.above or groups.below):
        yield "Among so many intervals, one in 20 is expected to exclude 0 by chance."
    if summary.personal:
        personal = join_words(summary.personal)
        yield f"Not compared, because there is no global model to test: {personal}."


def _significant(side: str, baseline: str, methods: tuple[str, ...]) -> str:
    return f"Significantly {side} {baseline} (the 95 % interval of the difference excludes 0): {join_words(methods)}."


def _paired(seeds: int) -> str:
    return f"{seeds} paired seed{'s' if seeds > 1 else ''}"


def name_of(column: Column) -> str:
    """Return a column's heading without its unit."""
    return column.heading.partition(",")[0]
