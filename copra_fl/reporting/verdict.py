"""The verdict of a comparison in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from copra_fl.records import ComparisonSummary
from copra_fl.reporting.tables import CLIENT_ACCURACY, POINTS, Column, compared_by, is_ranked, ranking
from copra_fl.wording import join_words

#: with fewer paired seeds no verdict is given: two values hardly show how much results vary
MIN_SEEDS = 3


def verdict(summary: ComparisonSummary) -> str:
    """Return what the accuracies of `compared_by` show, in plain sentences."""
    if is_ranked(summary):
        return " ".join(_verdict_on_many(summary))
    if not summary.differences:
        return _verdict_on_one(summary, summary.baseline)
    (method,) = summary.differences
    return _verdict_on_two(summary, method)


def _verdict_on_one(summary: ComparisonSummary, method: str) -> str:
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


def name_of(column: Column) -> str:
    """Return a column's heading without its unit."""
    return column.heading.partition(",")[0]


def _verdict_on_two(summary: ComparisonSummary, method: str) -> str:
    baseline, differences, lead = summary.baseline, summary.differences[method], compared_by(summary)
    if not differences.seeds:
        return f"{method} cannot be compared with {baseline} yet: no seed has finished with both."
    mean, interval = differences.get(lead.metric).mean, differences.get(lead.metric).interval
    if mean is None:
        results = " ".join(_verdict_on_one(summary, name) for name in (baseline, method))
        return f"{results} The two can only be compared on the clients' own data."
    result = (
        f"{method} ends {100 * abs(mean):.1f} points {'below' if mean < 0 else 'above'} {baseline} in {name_of(lead)}"
    )
    if interval is None:
        return (
            f"{result}, with the one seed that both have finished. "
            "One seed does not show how much results vary, so neither method can be called better."
        )
    low, high = map(POINTS.format, interval)
    if len(differences.seeds) < MIN_SEEDS:
        return (
            f"Too few seeds to tell: {result} (95 % interval {low} to {high} points, 2 paired seeds); "
            f"run {MIN_SEEDS} or more."
        )
    evidence = f"95 % interval {low} to {high} points, {len(differences.seeds)} paired seeds"
    if interval[0] <= 0 <= interval[1]:
        return f"No significant difference: {result}, but the interval includes 0 ({evidence})."
    return f"{result} ({evidence})."


def _verdict_on_many(summary: ComparisonSummary) -> Iterator[str]:
    baseline, methods, lead = summary.baseline, summary.methods, compared_by(summary)
    best = next((method for place, method in ranking(summary) if place), None)
    if best is not None:
        highest = lead.format(methods[best].get(lead.metric).mean)
        first = [method for place, method in ranking(summary) if place == 1]
        has = f"{best} has" if len(first) == 1 else f"{join_words(first)} have"
        yield f"{has} the highest {name_of(lead)} of {len(methods)} methods, {highest} %."
    elif methods.keys() - set(summary.personal):
        yield "No method has a test accuracy yet; the charts by round show their progress."
    differences = {
        method: difference
        for method, estimates in summary.differences.items()
        if (difference := estimates.get(lead.metric)).mean is not None
    }
    all_intervals = {method: difference.interval for method, difference in differences.items() if difference.interval}
    intervals = {
        method: interval
        for method, interval in all_intervals.items()
        if len(summary.differences[method].seeds) >= MIN_SEEDS
    }
    above = [method for method, (low, _) in intervals.items() if low > 0]
    below = [method for method, (_, high) in intervals.items() if high < 0]
    if too_few := list(all_intervals.keys() - intervals.keys()):
        few = join_words(sorted(too_few)) if intervals else "methods"
        differ = "differs" if intervals and len(too_few) == 1 else "differ"
        yield f"Too few seeds to tell whether {few} {differ} from {baseline}: 2 paired seeds; run {MIN_SEEDS} or more."
    if differences and not all_intervals:
        yield f"One seed does not show how much results vary, so no method can be called better than {baseline}."
    if above:
        yield f"Significantly above {baseline} (the 95 % interval of the difference excludes 0): {join_words(above)}."
    if below:
        yield f"Significantly below {baseline} (the 95 % interval of the difference excludes 0): {join_words(below)}."
    if unclear := len(intervals) - len(above) - len(below):
        if unclear == len(intervals):
            yield f"No method differs significantly from {baseline}: all 95 % intervals of the differences include 0."
        else:
            others = "other does" if unclear == 1 else "others do"
            yield f"{unclear} {others} not differ significantly from {baseline}."
    if len(intervals) >= 10 and (above or below):
        yield "Among so many intervals, one in 20 is expected to exclude 0 by chance."
    if summary.personal:
        personal = join_words(summary.personal)
        yield f"Not ranked, because there is no global model to test: {personal}."
