"""The real Flower apps in this process: a grid that calls the ClientApp for each message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.app import app as client_app
from copra_fl.config import Config
from experiments.bench.phases import ProcessGrid
from server import federation


class LocalGrid(ProcessGrid):
    """`num_nodes` nodes, or one for each of `node_configs`, whose exceptions become errors in their answers."""

    def __init__(
        self,
        num_nodes: int,
        app: ClientApp = client_app,
        node_configs: Sequence[Mapping[str, str | int]] | None = None,
    ) -> None:
        super().__init__(node_configs or [{}] * num_nodes, app)

    def answer(self, message: Message) -> Message:
        try:
            return super().answer(message)
        except Exception as error:  # as Flower does
            return Message(Error(code=0, reason=str(error)), reply_to=message)


def run_federation(flat: dict[str, object], directory: Path, num_nodes: int = 2, grid: Grid | None = None) -> Path:
    """Run the federation of `flat` with the real apps, and return its folder."""
    directory.mkdir(exist_ok=True)
    federation.run(grid or LocalGrid(num_nodes), Config.from_flat(flat), directory)
    return directory
