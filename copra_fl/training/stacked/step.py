"""What one forward of the stacked model has to know: the adapters, and which clients' are on where."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import Layout, part_of
from copra_fl.training.stacked.hidden_state_cache import PrefixCache


class Stack:
    """The adapters of C clients, a row each.

    Attributes:
        values: (C, P) float32.
        grads: (C, P), summed over backwards.
        tensors: adapter tensor name -> (C, *shape), views of `values`; those of the `trained` parts want a gradient.
    """

    def __init__(self, layout: Layout, values: Tensor, trained: Collection[str] = ()) -> None:
        self.values = values
        self.grads = torch.zeros_like(values)
        self.tensors = {name: _view(values, layout, name) for name in layout.shapes}
        names = [name for name in layout.shapes if part_of(name) in trained]
        self._trained = [self.tensors[name].requires_grad_() for name in names]
        self._totals = [_view(self.grads, layout, name) for name in names]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to `grads`; there are none where nothing is on and no head is trained."""
        if not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, self._trained, allow_unused=True)
        for total, grad in zip(self._totals, found, strict=True):
            if grad is not None:
                total += grad


def _view(matrix: Tensor, layout: Layout, name: str) -> Tensor:
    return matrix[:, layout.spans[name]].unflatten(1, layout.shapes[name])


@dataclass
class Step:
    """What one forward has to know. Clients are sorted by `depth`, and their rows with them.

    Attributes:
        stack: the adapters.
        clients: (c,) the stack's row of each client that takes part.
        on: (c, groups) whether a client's adapters of a gate group are on.
        depth: (c,) how many blocks are below the client's lowest active adapter.
        scale: (c,) what active adapters are multiplied by besides the model's scaling.
        dropout: one generator a client, where there is dropout.
        shapes: rows and tokens of each client's batch by itself, which is what dropout is drawn for.
        samples: (rows,) what the prefix cache knows each row by.
        targets: (c,) how many targets each client's rows have; None where all have as many.
        live: how many clients, from the first, are in the graph where the forward is now.
    """

    stack: Stack
    clients: np.ndarray
    on: np.ndarray
    depth: np.ndarray
    scale: Tensor
    dropout: Sequence[torch.Generator] = ()
    shapes: Sequence[tuple[int, int]] = ()
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    targets: np.ndarray | None = None
    live: int = 0
    _routes: dict[tuple[int, int], Route | None] = field(default_factory=dict)

    def route(self, group: int) -> Route | None:
        """The live clients whose `group` is on; None if there is none."""
        key = group, self.live
        if key not in self._routes:
            positions = np.flatnonzero(self.on[: self.live, group])
            self._routes[key] = Route.to(self, positions) if len(positions) else None
        return self._routes[key]


@dataclass(frozen=True)
class Route:
    """Clients that an adapter product is for.

    Attributes:
        positions: where they are among the step's clients.
        places: the same as a tensor; None where it is all that are live.
        rows: their rows of the stack; None where it is all of them in order.
        scale: (c, 1, 1).
    """

    positions: np.ndarray
    places: Tensor | None
    rows: Tensor | None
    scale: Tensor

    @classmethod
    def to(cls, step: Step, positions: np.ndarray) -> Route:
        device = step.scale.device
        places = torch.from_numpy(positions).to(device, non_blocking=True)
        clients = step.clients[positions]
        whole = np.array_equal(clients, np.arange(len(step.stack.values)))
        return cls(
            positions,
            None if len(positions) == step.live else places,
            None if whole else torch.from_numpy(clients).to(device, non_blocking=True),
            step.scale[places][:, None, None],
        )

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a stacked tensor that belong to these clients."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)


@dataclass
class Present:
    """What the layers of a stacked model share.

    Attributes:
        step: the one that is being made, during a forward.
        prefix: hidden states kept for rows that no adapter has touched, if wanted.
    """

    step: Step = field(init=False)
    prefix: PrefixCache | None = None


def by_client(values: Tensor, counts: np.ndarray) -> Tensor:
    """(targets, ...), the first counts[0] of them the first client's and so on, as (c, most, ...) padded with zeros."""
    shape = len(counts), int(counts.max())
    padded = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    return padded.index_copy(0, places(counts, values.device), values).unflatten(0, shape)


def places(counts: np.ndarray, device: torch.device) -> Tensor:
    """(targets,) where each target is among the (c * most) rows of `by_client`."""
    return torch.from_numpy(np.flatnonzero(np.arange(counts.max()) < counts[:, None])).to(device, non_blocking=True)
