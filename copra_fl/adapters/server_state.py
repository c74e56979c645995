"""The server's state between rounds, and its checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from copra_fl.adapters.state import Adapter, OptimizerState, join_names, split_names
from copra_fl.tensor_files import read_tensors, write_tensors

#: tensor of `ServerState.last_rounds` in a checkpoint: a row with client and round for each client
PAIRS = "pairs"


@dataclass(frozen=True)
class ServerState:
    """State that the server passes from round to round; each checkpoint contains all of it.

    Attributes:
        adapter: the global adapter; with a personal rule only the shared parts have a meaning.
        residual: the sum of what aggregation has added to W0 (`copra_fl.adapters.residual`).
        control_sum: the sum of all clients' control variates.
        first_moment: of the server optimizer.
        second_moment: of the server optimizer.
        optimizer: average state of the clients' optimizers, with ``optimizer-state = "shared"``.
        earlier: the global adapters before `adapter`, newest first, as many as clients may need.
        last_rounds: client -> the newest round that used its update; empty unless clients keep state.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    control_sum: Adapter = field(default_factory=dict)
    first_moment: Adapter = field(default_factory=dict)
    second_moment: Adapter = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    earlier: tuple[Adapter, ...] = ()
    last_rounds: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """True if no tensor has an infinite value or NaN."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self._tensors().values())

    def of_age(self, age: int) -> Adapter:
        """Return the global adapter of `age` rounds before the newest."""
        return self.earlier[age - 1] if age else self.adapter

    def save(self, path: Path, texts: Mapping[str, str]) -> None:
        """Write a checkpoint. The adapter's tensors keep their names, the others get a prefix such as ``residual/``."""
        write_tensors(path, self._tensors(), texts)

    def _tensors(self) -> Adapter:
        others = {kind: tensors for kind, tensors in vars(self).items() if kind != "adapter"}
        others["earlier"] = {str(age): tensors for age, tensors in enumerate(self.earlier, start=1)}
        if self.last_rounds:
            others["last_rounds"] = {PAIRS: torch.tensor(list(self.last_rounds.items()))}
        return self.adapter | join_names(others)

    @classmethod
    def load(cls, path: Path) -> tuple[ServerState, dict[str, str]]:
        """Read a checkpoint that `save` wrote: the state and the texts."""
        tensors, texts = read_tensors(path)
        adapter = {name: tensor for name, tensor in tensors.items() if "/" not in name}
        others = split_names({name: tensor for name, tensor in tensors.items() if "/" in name})
        by_age = others.pop("earlier", {})
        earlier = tuple(by_age[age] for age in sorted(by_age, key=int))
        last_rounds = others.pop("last_rounds", {PAIRS: torch.empty(0, 2)})[PAIRS]
        return cls(adapter, **others, earlier=earlier, last_rounds=dict(last_rounds.tolist())), texts
