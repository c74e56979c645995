"""Federations run in one process: their adapters and journals, and a grid that stops in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from flwr.app import Message

from copra_fl.adapters.state import load_checkpoint
from copra_fl.config import Config
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings


def final_adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(max((directory / "checkpoints").glob("*.safetensors")))[0]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def journal(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]


class Stop(Exception):
    """Stands for a kill: raised out of the federation after a given number of training messages."""


class StoppingGrid(LocalGrid):
    def __init__(self, num_nodes: int, messages: int) -> None:
        super().__init__(num_nodes)
        self.left = messages

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            self.left -= 1
            if self.left < 0:
                raise Stop
        return super().answer(message)


def finished_run(flat: Settings, directory: Path) -> Path:
    """The folder of a finished run, as `copra-fl simulate` leaves it."""
    run_federation(flat, directory)
    (directory / "config.toml").write_text(Config.from_flat(flat).to_toml())
    return directory
