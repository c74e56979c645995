"""Replies that come one after another, and one that never comes; on a clock that only the wait itself moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from queue import Queue
from typing import ClassVar

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.server.superlink.fleet.vce import vce_api

from server import delivery
from server.messaging import MIN_POLL_SECONDS, exchange
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
    grid, counts = SlowGrid(4, clock), dict[int, float]()
    exchange(grid, queries(grid), timeout=0.5, on_replies=lambda replies: counts.update({len(replies): clock.now}))
    assert counts == pytest.approx({1: 0, 2: 0.1, 3: 0.2}, abs=2 * MIN_POLL_SECONDS)


def test_the_wait_ends_with_the_last_reply(clock: Clock) -> None:
    """The replies come at 0 and 0.1 s; the last node is not asked."""
    grid = SlowGrid(3, clock)
    assert len(exchange(grid, queries(grid)[:2], timeout=60.0)) == 2
    assert 0.1 <= clock.now < 0.11


def test_a_message_that_flower_does_not_take_is_answered_by_an_error_at_once(clock: Clock) -> None:
    class Deaf(SlowGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            first, *others = messages
            first.metadata.__dict__["_message_id"] = "first"
            return ["", *super().push_messages(others)]

    grid = Deaf(3, clock)
    gone, reply = exchange(grid, queries(grid)[:2], timeout=60.0)
    assert gone.has_error() and gone.error.code == ErrorCode.NODE_UNAVAILABLE and gone.metadata.src_node_id == 100
    assert reply.metadata.src_node_id == 101 and clock.now < 0.11


def test_the_wait_ends_when_the_replies_are_enough(clock: Clock) -> None:
    grid = SlowGrid(4, clock)
    assert len(exchange(grid, queries(grid), timeout=60.0, enough=lambda replies: len(replies) >= 2)) == 2
    assert 0.1 <= clock.now < 0.11


def test_messages_reach_simulated_nodes_as_soon_as_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own loop would look for them every 0.1 s; ours waits for a minute here, unless it is woken."""
    delivery.replace_polling()  # as server.app does
    assert vce_api.add_messages_to_queue is delivery.deliver
    monkeypatch.setattr(delivery, "POLL_SECONDS", 60)

    class State:
        waiting: ClassVar[list[str]] = []

        def get_message_ins(self, node_id: int, limit: int) -> list[str]:
            return [self.waiting.pop()] if self.waiting else []

    queue, stop, grid = Queue[str](), threading.Event(), LocalGrid(1)
    thread = threading.Thread(target=vce_api.add_messages_to_queue, args=(State(), queue, [100], stop))
    thread.start()
    time.sleep(0.05)  # the loop has looked, and found nothing
    State.waiting.append("message")
    exchange(grid, [], timeout=1)
    assert queue.get(timeout=10) == "message"
    stop.set()
    delivery.announce()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_another_loop_of_flower_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(state: object, messages: object) -> None: ...

    monkeypatch.setattr(vce_api, "add_messages_to_queue", other)
    delivery.replace_polling()
    assert vce_api.add_messages_to_queue is other
