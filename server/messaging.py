"""Messages out, replies back, without waiting long after a reply is there.

Flower's own `send_and_receive` looks every 0.1 s in a simulation and every 3 s in a deployment; a round of small
clients can be over in less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

#: seconds between looks for replies, at least and at most; in between it is 2 % of the time waited so far
SHORTEST, LONGEST, SHARE = 0.005, 1.0, 0.02


def all_of_them(replies: Sequence[Message]) -> bool:
    """Only all replies are enough."""
    return False


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    is_enough: Callable[[Sequence[Message]], bool] = all_of_them,
    heard: Callable[[Sequence[Message]], None] = lambda replies: None,
) -> list[Message]:
    """Send `messages`, and collect the replies that come within `timeout` seconds, until they are enough.

    `heard` is called with all that have come, each time that some do. Returns them sorted by node. An error that
    Flower reports in place of a node that is gone counts as the node's.
    """
    messages = list(messages)
    waiting = set(grid.push_messages(messages))  # an id is missing, or None, where a node is not there any more
    asked = {message.metadata.message_id: message for message in messages}
    waiting &= asked.keys()
    replies: list[Message] = []
    started = time.monotonic()
    while waiting and not is_enough(replies) and (waited := time.monotonic() - started) < timeout:
        came = list(grid.pull_messages(waiting))
        for reply in came:
            message = asked[reply.metadata.reply_to_message_id]
            replies.append(Message(reply.error, reply_to=message) if reply.has_error() else reply)
        if came:
            heard(replies)
        waiting -= {reply.metadata.reply_to_message_id for reply in came}
        if waiting:
            time.sleep(min(LONGEST, max(SHORTEST, SHARE * waited)))
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)
