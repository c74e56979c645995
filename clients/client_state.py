"""What a node keeps of its clients from round to round: personal tensors, control variates, what rounding lost.

It lies on the node's disk, below the cache, so that it outlives messages, processes and restarts. A client has a file
a round, and the two newest stay: a run that is resumed at round t reads what was left behind before t, whatever a
round that was cut short has written since.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from copra_fl.adapters.state import Adapter, load_checkpoint, save_checkpoint
from copra_fl.files import cache_dir


@dataclass(frozen=True)
class ClientState:
    """
    Attributes:
        personal: the tensors that do not travel, after the last training.
        control: its control variate.
        lost: what rounding has lost so far of what it sent.
    """

    personal: Adapter = field(default_factory=dict)
    control: Adapter = field(default_factory=dict)
    lost: Adapter = field(default_factory=dict)


class Memory:
    """The clients' states of one run."""

    def __init__(self, run: str) -> None:
        self._directory = cache_dir() / "clients" / run

    def read(self, client: int, before: int) -> ClientState:
        """What `client` left behind in its last round below `before`; an empty state where it had none."""
        written = [path for path in self._files(client) if path.name < self._file(client, before).name]
        if not written:
            return ClientState()
        tensors, _ = load_checkpoint(written[-1])
        kinds: dict[str, Adapter] = {}
        for name, tensor in tensors.items():
            kind, _, name = name.partition("/")
            kinds.setdefault(kind, {})[name] = tensor
        return ClientState(**kinds)

    def write(self, client: int, server_round: int, state: ClientState) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{kind}/{name}": tensor for kind, adapter in vars(state).items() for name, tensor in adapter.items()
        }
        save_checkpoint(self._file(client, server_round), tensors, {})
        current = [path for path in self._files(client) if path.name <= self._file(client, server_round).name]
        for path in current[:-2]:
            path.unlink()

    def _file(self, client: int, server_round: int) -> Path:
        return self._directory / f"client-{client}-round-{server_round:05d}.safetensors"

    def _files(self, client: int) -> list[Path]:
        return sorted(self._directory.glob(f"client-{client}-round-*.safetensors"))
