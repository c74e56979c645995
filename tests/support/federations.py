"""Results of federations that ran in this process, and a grid that stops a run in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from flwr.app import Message

from copra_fl.adapters.server_state import ServerState
from copra_fl.config import Config
from copra_fl.tensor_files import read_tensors
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings


def final_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the last checkpoint."""
    return read_tensors(last_checkpoint(directory))[0]


def final_state(directory: Path) -> ServerState:
    """Return the server's state in the last checkpoint."""
    return ServerState.load(last_checkpoint(directory))[0]


def last_checkpoint(directory: Path) -> Path:
    return max((directory / "checkpoints").glob("*.safetensors"))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Compare names and values, bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def journal(directory: Path) -> list[dict]:
    """Return the journal as plain JSON, so that a test also sees a change of the schema."""
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]


class Stop(Exception):
    """Simulates a kill: leaves the federation after a given number of training messages."""


class StoppingGrid(LocalGrid):
    """Raises `Stop` in place of the answer to training message number `messages` + 1."""

    def __init__(self, num_nodes: int, messages: int) -> None:
        super().__init__(num_nodes)
        self.remaining = messages

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            self.remaining -= 1
            if self.remaining < 0:
                raise Stop
        return super().answer(message)


def finished_comparison(flat: Settings, methods: Iterable[str], seeds: Iterable[int], directory: Path) -> Path:
    """Run a federation of `flat` for each local training in `methods` and each seed; return the folder."""
    directory.mkdir(parents=True)
    for method, seed in product(methods, seeds):
        finished_run(flat | {"local-training": method, "seed": seed}, directory / f"{method}-seed{seed}")
    return directory


def finished_run(flat: Settings, directory: Path) -> Path:
    """Run the federation of `flat` and return its folder, with config.toml as `copra-fl simulate` writes it."""
    run_federation(flat, directory)
    (directory / "config.toml").write_text(Config.from_flat(flat).to_toml())
    return directory
