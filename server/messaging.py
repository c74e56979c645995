"""Exchange of messages: send them, and return soon after the last reply has come.

Flower's own `send_and_receive` polls every 0.1 s in a simulation and every 3 s in a deployment; a round of small
clients can take less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from copra_fl.wording import foreign, shortened
from server import delivery

#: seconds between two polls: this share of the time waited so far, within these limits
POLL_SHARE, MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.005, 1.0

#: Ray's errors for a worker process that ended before it replied
KILLED = ("ActorDiedError", "OutOfMemoryError", "WorkerCrashedError")
#: characters of Ray's own words on such an error that are shown
MAX_RAY = 200


def wait_for_all(replies: Sequence[Message]) -> bool:
    """Wait for all replies: the replies so far are never enough."""
    return False


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    enough: Callable[[Sequence[Message]], bool] = wait_for_all,
    on_replies: Callable[[Sequence[Message]], None] = lambda replies: None,
) -> list[Message]:
    """Send `messages` and return the replies, sorted by node.

    An error in place of a node that is gone counts as the node's reply, whether Flower reports it later or does not
    take the message.

    Args:
        timeout: seconds after which the wait ends.
        enough: called with all replies so far; the wait ends when it returns True.
        on_replies: called with all replies so far whenever new ones have come.
    """
    messages = list(messages)
    pushed = set(grid.push_messages(messages))  # the id of a message to a node that is gone is missing, or None
    sent = {message.metadata.message_id: message for message in messages}
    delivery.announce()
    waiting = pushed & sent.keys()
    gone = Error(ErrorCode.NODE_UNAVAILABLE, "Flower did not take the message: the node is gone, or it is too large")
    replies = [failed(message, gone) for number, message in sent.items() if number not in pushed]
    started = time.monotonic()
    while waiting and not enough(replies) and (waited := time.monotonic() - started) < timeout:
        new_replies = list(grid.pull_messages(waiting))
        for reply in new_replies:
            message = sent[reply.metadata.reply_to_message_id]
            replies.append(failed(message, reply.error) if reply.has_error() else reply)
        if new_replies:
            on_replies(replies)
        waiting -= {reply.metadata.reply_to_message_id for reply in new_replies}
        if waiting:
            time.sleep(min(MAX_POLL_SECONDS, max(MIN_POLL_SECONDS, POLL_SHARE * waited)))
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def failed(message: Message, error: Error) -> Message:
    """Return the reply to `message` of a node that failed."""
    return Message(Error(error.code, readable_reason(error.reason)), reply_to=message)


def readable_reason(reason: str | None) -> str:
    """Return why a node failed. The node chose the `reason`, whatever its length, or Ray did."""
    text = foreign(reason)
    if not any(f"ray.exceptions.{name}" in text for name in KILLED):
        return text
    return (
        "its worker process was killed, most often because memory ran out; fewer --workers or a smaller "
        f"max-memory-gb need less (Ray: {shortened(text, MAX_RAY)})"
    )
