"""Replies that come one after the other, and one that never comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import pytest
from flwr.app import Message, RecordDict

from server.messaging import SHARE, SHORTEST, exchange
from tests.support.local_grid import LocalGrid


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the module that `exchange` is in."""
    clock = Clock()
    monkeypatch.setattr(sys.modules[exchange.__module__], "time", clock)
    return clock


class SlowGrid(LocalGrid):
    """Node i answers after i tenths of a second; the last one never does."""

    def __init__(self, num_nodes: int, clock: Clock) -> None:
        super().__init__(num_nodes)
        self.clock = clock

    def answer(self, message: Message) -> Message:
        return Message(RecordDict(), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = [self.replies[number] for number in message_ids]
        *answering, _ = self.contexts
        due = {node for tenths, node in enumerate(answering) if self.clock.now >= tenths / 10}
        return [reply for reply in waiting if reply.metadata.src_node_id in due]


def queries(nodes: Iterable[int]) -> list[Message]:
    return [Message(RecordDict(), node, "query") for node in nodes]


def test_replies_come_once_each_until_the_time_is_up(clock: Clock) -> None:
    grid = SlowGrid(4, clock)
    replies = exchange(grid, queries(grid.get_node_ids()), timeout=0.5)
    assert [reply.metadata.src_node_id for reply in replies] == [100, 101, 102]
    assert 0.5 <= clock.now <= 0.5 * (1 + SHARE)


def test_replies_are_told_of_as_they_come(clock: Clock) -> None:
    grid, counts, seconds = SlowGrid(4, clock), list[int](), list[float]()

    def heard(replies: Sequence[Message]) -> None:
        counts.append(len(replies))
        seconds.append(clock.now)

    exchange(grid, queries(grid.get_node_ids()), timeout=0.5, heard=heard)
    assert counts == [1, 2, 3]
    assert seconds == pytest.approx([0, 0.1, 0.2], abs=2 * SHORTEST)


def test_nothing_is_waited_for_when_all_are_there(clock: Clock) -> None:
    grid = SlowGrid(3, clock)
    assert len(exchange(grid, queries((100, 101)), timeout=60.0)) == 2
    assert 0.1 <= clock.now <= 0.1 + SHORTEST
