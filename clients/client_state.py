"""State of clients between rounds, on the node's disk: personal tensors, control variates, quantization errors, and
the state of the local optimizer.

It is stored below the cache folder, so that it survives messages, processes and restarts. Each client has a folder
with one file per round, and the two newest are kept: a run that resumes at round t needs the state from before t, also
if the interrupted round t has already written its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from copra_fl.adapters.state import Adapter, OptimizerState, Update, join_names, parts, split_names
from copra_fl.aggregation import ALL, find_rule
from copra_fl.config import Config
from copra_fl.files import cache_dir
from copra_fl.tensor_files import read_tensors, write_tensors

#: newest rounds whose states are kept for each client
NUM_KEPT = 2
#: text in the file of a state, except in the client's first: name of the file of the state before it
PREVIOUS = "previous"


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


class ClientStateStore:
    """The states of the clients of one run."""

    def __init__(self, run: str) -> None:
        self._directory = cache_dir() / "clients" / run

    def read(self, client: int, before: int) -> ClientState:
        """Return the state of `client` after its last round below `before`; an empty one if there was no such round.

        States of `before` and later rounds are removed: the server has given up that attempt, and the client may fail
        in the next. Raises DamagedFile if a file is damaged, StateGone if the state was removed.
        """
        files = self._files(client)
        earlier = [path for path in files if path.name < self._file(client, before).name]
        if files and not earlier and before > 1 and PREVIOUS in read_tensors(files[0])[1]:
            raise StateGone(
                f"the state of client {client} before round {before} is gone: its node keeps those of the two newest "
                "rounds, and the server went back further; start the run anew"
            )
        for path in files[len(earlier) :]:
            path.unlink()
        if not earlier:
            return ClientState()
        tensors, _ = read_tensors(earlier[-1])
        return ClientState(**split_names(tensors))

    def write(self, client: int, server_round: int, state: ClientState) -> None:
        """Write the state of `client` after a round, and remove all but the two newest."""
        self._folder(client).mkdir(parents=True, exist_ok=True)
        file = self._file(client, server_round)
        earlier = [path for path in self._files(client) if path.name < file.name]
        write_tensors(file, join_names(vars(state)), {PREVIOUS: earlier[-1].name} if earlier else {})
        for path in earlier[: 1 - NUM_KEPT]:
            path.unlink()

    def _folder(self, client: int) -> Path:
        """Return the client's own folder: a search among the files of all clients would take ever longer."""
        return self._directory / f"client-{client}"

    def _file(self, client: int, server_round: int) -> Path:
        return self._folder(client) / f"round-{server_round:05d}.safetensors"

    def _files(self, client: int) -> list[Path]:
        return sorted(self._folder(client).glob("round-*.safetensors"))
