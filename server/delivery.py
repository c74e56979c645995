"""Delivery of messages to simulated nodes as soon as they are sent.

In a simulation Flower looks for messages of the server app every 0.1 s (flwr 1.42, `vce_api.add_messages_to_queue`), so
every exchange waits 0.05 s on average; a round of small clients takes 0.3 s. This module is the only one that replaces
a function of Flower: by the same loop, which `announce` wakes up. In a version of Flower with another function nothing
is replaced, and messages wait as before.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterable
from queue import Queue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.server.superlink.linkstate import LinkState

#: Flower's module with the loop; imported in the process of a simulation only
MODULE = "flwr.server.superlink.fleet.vce.vce_api"
#: seconds between two looks at the messages without an announcement, as in Flower
POLL_SECONDS = 0.1

_sent = threading.Event()


def announce() -> None:
    """Say that messages have been sent."""
    _sent.set()


def replace_polling() -> None:
    """Replace Flower's loop in this process, if it is that of a simulation; before Flower starts it."""
    names = vars(sys.modules[MODULE]) if MODULE in sys.modules else {}
    loop = names.get("add_messages_to_queue")
    if loop and inspect.signature(loop).parameters.keys() == inspect.signature(deliver).parameters.keys():
        names["add_messages_to_queue"] = deliver


def deliver(state: LinkState, queue: Queue[Message], nodes_mapping: Iterable[int], f_stop: threading.Event) -> None:
    """Put the messages to the nodes of `nodes_mapping` from `state` into `queue`, until `f_stop` is set."""
    while not f_stop.is_set():
        _sent.clear()  # before the look, so that no announcement is lost
        for node in nodes_mapping:
            for message in state.get_message_ins(node_id=node, limit=1):
                queue.put(message)
        _sent.wait(POLL_SECONDS)
