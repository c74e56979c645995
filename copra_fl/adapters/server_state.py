"""What the server carries from round to round: all of it is in each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from copra_fl.adapters.state import Adapter


@dataclass(frozen=True)
class State:
    """
    Attributes:
        adapter: the global adapter; with a personal rule only what is shared means anything.
        residual: what aggregation has added to W0 so far (`copra_fl.adapters.residual`).
        control: the global control variate.
        first_moment: of the server optimiser.
        second_moment: of the server optimiser.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    control: Adapter = field(default_factory=dict)
    first_moment: Adapter = field(default_factory=dict)
    second_moment: Adapter = field(default_factory=dict)

    def to_tensors(self) -> Adapter:
        """All tensors by name: the adapter's under their own, the others after ``control/`` and so on."""
        others = {kind: tensors for kind, tensors in vars(self).items() if kind != "adapter"}
        return self.adapter | {f"{kind}/{name}": t for kind, tensors in others.items() for name, t in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Adapter) -> State:
        """The inverse of `to_tensors`."""
        kinds: dict[str, Adapter] = {"adapter": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.rpartition("/")
            kinds.setdefault(kind or "adapter", {})[rest] = tensor
        return cls(**kinds)
