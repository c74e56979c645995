"""The real Flower apps in this process: a grid that calls the ClientApp for each message.

The grid sets Flower's private TaskIdentity, which messages need for their run id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as client_app
from copra_fl.config import Config
from server import federation


class LocalGrid(Grid):
    """`num_nodes` nodes that run `app`. Node 100 + i has partition-id i, and `node_configs[i]` in addition."""

    def __init__(
        self,
        num_nodes: int,
        app: ClientApp = client_app,
        node_configs: Sequence[Mapping[str, str | int]] | None = None,
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.app = app
        self.replies: dict[str, Message] = {}
        self.contexts = {
            100 + i: Context(1, 100 + i, {"partition-id": i, "num-partitions": num_nodes} | config, RecordDict(), {})
            for i, config in enumerate(node_configs or [{}] * num_nodes)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, each of which is answered at once."""
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.replies[message.metadata.message_id] = self.answer(message)
            yield message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]

    def answer(self, message: Message) -> Message:
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does
            return Message(Error(code=0, reason=str(error)), reply_to=message)

    def set_run(self, run: object) -> None: ...
    def run(self) -> None: ...
    def create_message(self, *args: object, **kwargs: object) -> None: ...
    def get_nodes(self) -> None: ...
    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> None: ...


def run_federation(flat: dict[str, object], directory: Path, num_nodes: int = 2, grid: Grid | None = None) -> Path:
    """Run the federation of `flat` with the real apps, and return its folder."""
    directory.mkdir(exist_ok=True)
    federation.run(grid or LocalGrid(num_nodes), Config.from_flat(flat), directory)
    return directory
