"""Replies changed at random: the server refuses them or can use them; it never stops, and its memory is bounded."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.replies import MAX_OTHER_NORM
from server.strategy import CohortStrategy
from tests.test_strategy import make_request, make_strategy, replies_to

#: kilobytes that all replies together may add to the process
MAX_GROWTH = 300_000
DTYPES = ["float32", "float64", "float16", "int8", "int64", "bool", "complex64", "object", "<U100000000", "nonsense"]

numbers = st.one_of(
    st.floats(), st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, 3e38, 1e20, 2**62, float("nan")])
)
texts = st.one_of(st.text(max_size=50), st.just("\x1b[2J\n" * 500), st.just("A" * 10**5))
values = st.one_of(numbers, texts, st.booleans(), st.binary(max_size=50), st.lists(numbers, max_size=5))
arrays = st.builds(
    lambda dtype, shape, stype, data: Array(dtype, shape, stype, data),
    st.sampled_from(DTYPES),
    st.lists(st.integers(-1, 10**13), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "pickle", ""]),
    st.one_of(st.binary(max_size=300), st.just(Array(np.zeros(10, np.float32)).data)),
)


def floats_with(bad: float, position: int) -> Array:
    array = np.ones(10, np.float32)
    array[position] = bad
    return Array(array)


tensors = st.one_of(arrays, st.builds(floats_with, st.floats(width=32), st.integers(0, 9)))


@st.composite
def changes(draw: st.DrawFn) -> Callable[[RecordDict], None]:
    """Draw a change of a reply's content: of one value, of one record, or of the records' names."""
    kind = draw(st.sampled_from(["value", "drop value", "drop record", "swap", "rename", "tensor", "flip"]))
    which, other, value, tensor = draw(st.integers(0, 99)), draw(st.integers(0, 99)), draw(values), draw(tensors)
    name = draw(st.one_of(texts, st.sampled_from(["metrics-7", "adapters", "pooled", "echo", "failures"])))

    def change(content: RecordDict) -> None:
        names = sorted(content)
        if not names:
            return
        chosen = names[which % len(names)]
        record: Any = content[chosen]
        keys = sorted(record)
        if kind == "drop record":
            del content[chosen]
        elif kind == "rename":
            content[name or "x"] = content.pop(chosen)
        elif kind == "swap":
            content[chosen] = content[names[other % len(names)]]
        elif kind == "drop value" and keys:
            del record[keys[other % len(keys)]]
        elif kind == "tensor":
            content[chosen] = ArrayRecord({"values": tensor})
        elif kind == "flip" and isinstance(record, ArrayRecord) and keys:
            array = record[keys[0]]
            data = bytearray(array.data)
            if data:
                data[other % len(data)] ^= 1 << which % 8
            record[keys[0]] = Array(array.dtype, array.shape, array.stype, bytes(data))
        elif kind == "value" and isinstance(record, ConfigRecord | MetricRecord):
            record[keys[other % len(keys)] if keys else "x"] = value

    return change


@pytest.fixture(autouse=True)
def identity() -> None:
    """Flower's messages need the id of a run and a node."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def check_one(changed: list[Callable[[RecordDict], None]]) -> CohortStrategy:
    """Let the real strategy aggregate the changed reply of one node and the honest one of another."""
    strategy = make_strategy(failures="tolerant")
    request = make_request(strategy, [0, 1, 2, 5, 7, 8], inspected={1, 2})
    bad, honest = replies_to(strategy, request)
    for change in changed:
        try:
            change(bad.content)
        except (TypeError, ValueError, KeyError):  # Flower's own records refuse it, so no node can send it
            continue
    result = strategy.aggregate_train(request, [bad, honest])
    trained = {update.client for update in result.updates}
    assert {1, 5, 7} <= trained, "the other node's clients are not affected"
    assert trained | result.missing.keys() == {0, 1, 2, 5, 7, 8}
    for reason in result.missing.values():
        assert len(reason) <= 2000 and reason.isprintable()
    assert strategy.state.is_finite
    assert all(float(tensor.abs().max()) <= MAX_OTHER_NORM for tensor in strategy.state.adapter.values())
    return strategy


def fuzz(max_examples: int) -> None:
    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(changes(), min_size=1, max_size=4))
    def run(changed: list[Callable[[RecordDict], None]]) -> None:
        check_one(changed)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH


def test_changed_replies_are_refused_or_usable() -> None:
    fuzz(40)


@pytest.mark.slow
def test_ten_thousand_changed_replies_are_refused_or_usable() -> None:
    fuzz(10_000)


def test_the_honest_reply_is_used_whole() -> None:
    """So the cases above can fail: nothing is missing without a change."""
    strategy = make_strategy(failures="tolerant")
    request = make_request(strategy, [0, 1, 2, 5, 7, 8], inspected={1, 2})
    result = strategy.aggregate_train(request, replies_to(strategy, request))
    assert not result.missing and len(result.updates) == 6
