"""The verdict of a comparison in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from copra_fl.reporting.tables import (
    CLIENT_ACCURACY,
    POINTS,
    TEST_ACCURACY,
    is_ranked,
    ranking,
)
from copra_fl.wording import join_words


def verdict(summary: Mapping[str, Any]) -> str:
    """What the test accuracies say, in plain sentences."""
    if is_ranked(summary):
        return " ".join(_verdict_on_many(summary))
    if not summary["differences"]:
        return _verdict_on_one(summary, summary["baseline"])
    (method,) = summary["differences"]
    return _verdict_on_two(summary, method)


def _verdict_on_one(summary: Mapping[str, Any], method: str) -> str:
    found = summary["methods"][method]
    if not found["seeds"]:
        return f"{method} has not finished yet; the figures by round show how far it is."
    if method in summary["personal"]:
        return (
            f"With {method} each client keeps its own model, so there is no global one to test; on the clients' own "
            f"validation data they reach {CLIENT_ACCURACY.show(found['client_accuracy'])} %."
        )
    return f"{method} reaches a test accuracy of {TEST_ACCURACY.show(found['test_accuracy'])} %."


def _verdict_on_two(summary: Mapping[str, Any], method: str) -> str:
    baseline, found = summary["baseline"], summary["differences"][method]
    if not found["seeds"]:
        return f"{method} cannot be compared with {baseline} yet: no seed has finished with both."
    mean, interval = found["test_accuracy"]["mean"], found["test_accuracy"]["interval"]
    if mean is None:
        ends = " ".join(_verdict_on_one(summary, one) for one in (baseline, method))
        return f"{ends} The two can only be compared on the clients' own data."
    ends = f"{method} ends {100 * abs(mean):.1f} points {'below' if mean < 0 else 'above'} {baseline} in test accuracy"
    if interval is None:
        return (
            f"{ends} with the one seed that both have finished. "
            "One seed tells nothing about the spread, so neither can be called better."
        )
    low, high = map(POINTS.format, interval)
    evidence = f"95 % interval {low} to {high} points, {len(found['seeds'])} seeds in pairs"
    if interval[0] <= 0 <= interval[1]:
        return f"{method} and {baseline} cannot be told apart: {ends}, but the interval covers 0 ({evidence})."
    return f"{ends} ({evidence})."


def _verdict_on_many(summary: Mapping[str, Any]) -> Iterator[str]:
    baseline, methods = summary["baseline"], summary["methods"]
    best = next((method for place, method in ranking(summary) if place), None)
    if best is None:
        yield "None of the methods has a test accuracy yet; the figures by round show how far they are."
    else:
        highest = TEST_ACCURACY.format(methods[best]["test_accuracy"]["mean"])
        yield f"{best} has the highest test accuracy of {len(methods)} methods, {highest} %."
    differences = {
        method: found["test_accuracy"]
        for method, found in summary["differences"].items()
        if found["seeds"] and found["test_accuracy"]["mean"] is not None
    }
    sure = {method: found["interval"] for method, found in differences.items() if found["interval"]}
    above = [method for method, (low, _) in sure.items() if low > 0]
    below = [method for method, (_, high) in sure.items() if high < 0]
    if differences and not sure:
        yield f"One seed tells nothing about the spread, so none can be called better than {baseline}."
    if above:
        yield f"Above {baseline}, with a 95 % interval that does not cover 0: {join_words(above)}."
    if below:
        yield f"Below {baseline}, with a 95 % interval that does not cover 0: {join_words(below)}."
    if apart := len(sure) - len(above) - len(below):
        who = "No method can" if apart == len(sure) else f"{apart} other{'s' if apart > 1 else ''} cannot"
        yield f"{who} be told apart from {baseline}: the 95 % interval of the difference covers 0."
    if len(sure) >= 10 and (above or below):
        yield "Of so many intervals, one in 20 misses 0 by chance."
    if summary["personal"]:
        personal = join_words(summary["personal"])
        yield f"Without a global model, so only to be compared on the clients' own data: {personal}."
