"""State of clients between rounds, on the node's disk: personal tensors, control variates, quantization errors, and
the state of the local optimizer.

It is stored below the cache folder, so that it survives messages, processes and restarts. Each client has a folder
with one file per round in which it has trained. The server names the newest round that used the client's update, and
the client goes on from the state after that round: a round whose reply was lost or rejected, or that was interrupted,
leaves no trace. The file that a round began with is kept until the next one, because the round may be done again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from copra_fl.adapters.state import Adapter, OptimizerState, Update, join_names, parts, split_names
from copra_fl.aggregation import ALL, find_rule
from copra_fl.config import Config
from copra_fl.files import cache_dir
from copra_fl.tensor_files import read_tensors, write_tensors
from copra_fl.wording import foreign

#: ids of runs
RUN_ID = re.compile(r"[\w-]+")


class StateGone(RuntimeError):
    """A client's state that was removed and is needed. The message says what to do."""


@dataclass(frozen=True)
class ClientState:
    """State of one client after a round.

    Attributes:
        personal: the tensors that do not travel, after the last training.
        control: the client's control variate.
        quantization_error: the part of the client's changes that rounding has withheld from the server so far.
        optimizer: moments and step counts of the local optimizer.
    """

    personal: Adapter = field(default_factory=dict)
    control: Adapter = field(default_factory=dict)
    quantization_error: Adapter = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)

    def after(self, update: Update, config: Config, quantization_error: Adapter) -> ClientState:
        """Return the state after the training that gave `update`; tensors that were not trained keep their values."""
        moments = {kind: self.optimizer.get(kind, {}) | tensors for kind, tensors in update.optimizer.items()}
        return ClientState(
            personal=self.personal | parts(update.adapter, ALL - find_rule(config.aggregation.rule).shares),
            control=self.control | update.gradient,
            quantization_error=quantization_error,
            optimizer=(moments or self.optimizer) if config.training.optimizer_state == "client" else {},
        )


def run_folder(run: str) -> Path:
    """Return the folder for what nodes on this machine keep of a run.

    Raises ValueError for an id that is more than a name: it comes from the server.
    """
    if not RUN_ID.fullmatch(run):
        raise ValueError(f"run = {foreign(run, 100)!r} must be letters, digits, - and _")
    return cache_dir() / "clients" / run


class ClientStateStore:
    """The states of the clients of one run."""

    def __init__(self, run: str) -> None:
        self._directory = run_folder(run)

    def read(self, client: int, last_round: int) -> ClientState:
        """Return the state of `client` after `last_round`, the newest that used its update; an empty one after 0.

        Raises DamagedFile if the file is damaged, StateGone without it.
        """
        if not last_round:
            return ClientState()
        file = self._file(client, last_round)
        if not file.exists():
            raise StateGone(
                f"the state of client {client} after round {last_round} is gone: the cache folder of its node was "
                "emptied or replaced, or the server went back more than a round; restore the folder from a backup, or "
                "start the run anew"
            )
        return ClientState(**split_names(read_tensors(file)[0]))

    def rounds(self, client: int) -> list[int]:
        """Return the rounds after which there is a state of `client`."""
        return [int(path.stem.removeprefix("round-")) for path in self._folder(client).glob("round-*.safetensors")]

    def write(self, client: int, server_round: int, state: ClientState, last_round: int) -> None:
        """Write the state of `client` after a round that began with its state after `last_round`.

        That one stays, and those of later rounds, which a slow training can write first; all others are removed.
        """
        self._folder(client).mkdir(parents=True, exist_ok=True)
        file, start = self._file(client, server_round), self._file(client, last_round)
        write_tensors(file, join_names(vars(state)), {}, mode=0o600)
        for path in self._folder(client).glob("round-*.safetensors"):
            if path.name < file.name and path.name != start.name:
                path.unlink()

    def _folder(self, client: int) -> Path:
        """Return the client's own folder: a search among the files of all clients would take ever longer."""
        return self._directory / f"client-{client}"

    def _file(self, client: int, server_round: int) -> Path:
        return self._folder(client) / f"round-{server_round:05d}.safetensors"
