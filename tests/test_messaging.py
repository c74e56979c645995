"""Replies that come one after another, and one that never comes; on a clock that only the wait itself moves."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Message, RecordDict

from server.messaging import exchange
from tests.support.local_grid import LocalGrid


class Clock:
    """In place of the module `time`: sleeping moves it, nothing else does."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.messaging.time", clock)
    return clock


class SlowGrid(LocalGrid):
    """Node i replies after i tenths of a second; the last node never does."""

    def __init__(self, num_nodes: int, clock: Clock) -> None:
        super().__init__(num_nodes)
        self.clock = clock

    def answer(self, message: Message) -> Message:
        return Message(RecordDict(), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        *replying, _ = self.contexts
        due = {node for tenths, node in enumerate(replying) if self.clock.now >= tenths / 10}
        return [reply for number in message_ids if (reply := self.replies[number]).metadata.src_node_id in due]


def queries(grid: SlowGrid) -> list[Message]:
    return [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]


def test_replies_are_collected_until_the_timeout(clock: Clock) -> None:
    grid = SlowGrid(4, clock)
    replies = exchange(grid, queries(grid), timeout=0.5)
    assert [reply.metadata.src_node_id for reply in replies] == [100, 101, 102]
    assert 0.5 <= clock.now < 0.52


def test_new_replies_are_reported_as_they_come(clock: Clock) -> None:
    grid, counts = SlowGrid(4, clock), list[int]()
    exchange(grid, queries(grid), timeout=0.5, on_replies=lambda replies: counts.append(len(replies)))
    assert counts == [1, 2, 3]


def test_the_wait_ends_with_the_last_reply(clock: Clock) -> None:
    """The replies come at 0 and 0.1 s; the last node is not asked."""
    grid = SlowGrid(3, clock)
    assert len(exchange(grid, queries(grid)[:2], timeout=60.0)) == 2
    assert 0.1 <= clock.now < 0.11


def test_the_wait_ends_when_the_replies_are_enough(clock: Clock) -> None:
    grid = SlowGrid(4, clock)
    assert len(exchange(grid, queries(grid), timeout=60.0, enough=lambda replies: len(replies) >= 2)) == 2
    assert 0.1 <= clock.now < 0.11
