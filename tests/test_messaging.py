"""Replies that come one after the other, and one that never comes."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from flwr.app import Message, RecordDict

from server.messaging import exchange
from tests.support.local_grid import LocalGrid


class SlowGrid(LocalGrid):
    """Node i answers after i tenths of a second; the last one never does."""

    def answer(self, message: Message) -> Message:
        return Message(RecordDict(), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.looks = [*getattr(self, "looks", []), time.monotonic()]
        waited = self.looks[-1] - self.looks[0]
        there = [self.replies[number] for number in message_ids]
        *answering, _ = self.contexts
        due = {node for tenths, node in enumerate(answering) if waited >= tenths / 10}
        return [reply for reply in there if reply.metadata.src_node_id in due]


def ask(grid: SlowGrid, timeout: float) -> list[int]:
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    return [reply.metadata.src_node_id for reply in exchange(grid, messages, timeout)]


def test_replies_come_once_each_until_the_time_is_up() -> None:
    started = time.monotonic()
    assert ask(SlowGrid(4), timeout=0.5) == [100, 101, 102]
    assert 0.5 <= time.monotonic() - started < 1.5


def test_replies_are_told_of_as_they_come() -> None:
    grid, heard = SlowGrid(4), list[int]()
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    exchange(grid, messages, timeout=0.5, heard=lambda replies: heard.append(len(replies)))
    assert heard == sorted(set(heard)) and heard[-1] == 3


def test_nothing_is_waited_for_when_all_are_there() -> None:
    grid = SlowGrid(3)
    del grid.contexts[102]
    grid.contexts[999] = grid.contexts[101]
    messages = [Message(RecordDict(), node, "query") for node in (100, 101)]
    started = time.monotonic()
    assert len(exchange(grid, messages, timeout=60.0)) == 2
    assert time.monotonic() - started == pytest.approx(0.1, abs=0.1)
