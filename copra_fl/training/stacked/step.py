"""Inputs of the stacked model's forward pass in addition to the batch: adapters, clients, active gates, rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import Layout, part_of


class Stack:
    """The adapters of C clients, one row each.

    Attributes:
        values: (C, P) float32.
        grads: (C, P), summed over backward passes.
        tensors: adapter tensor name -> (C, *shape), views of `values`; those of the `trained` parts require a gradient.
    """

    def __init__(self, layout: Layout, values: Tensor, trained: Collection[str] = ()) -> None:
        self.layout = layout
        self.trained = trained
        self.values = values
        self.grads = torch.zeros_like(values)
        self.tensors = views(values, layout)
        names = [name for name in layout.shapes if part_of(name) in trained]
        self._leaves = [self.tensors[name].requires_grad_() for name in names]
        self._totals = [_view(self.grads, layout, name) for name in names]

    def with_values(self, values: Tensor) -> Stack:
        """Return a stack of the adapters in `values` (c, P), of which the same parts are trained."""
        return Stack(self.layout, values, self.trained)

    def select(self, rows: np.ndarray) -> Stack:
        """Return a stack of the adapters in `rows`: a copy, or this stack if these are all its rows in order."""
        if np.array_equal(rows, np.arange(len(self.values))):
            return self
        return self.with_values(self.values.index_select(0, on_device(rows, self.values.device)))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to `grads`. Without an active adapter and a trained head they are zero."""
        if not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        for total, grad in zip(self._totals, grads, strict=True):
            if grad is not None:
                total += grad


def views(rows: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the adapters in `rows` (..., P) as adapter tensor name -> (..., *shape), views of `rows`."""
    return {name: _view(rows, layout, name) for name in layout.shapes}


def _view(rows: Tensor, layout: Layout, name: str) -> Tensor:
    return rows[..., layout.spans[name]].unflatten(-1, layout.shapes[name])


@dataclass(frozen=True)
class Fallback:
    """The frozen adapters that layers use while they are off.

    Attributes:
        tensors: adapter tensor name -> (c, *shape), or (*shape) if all clients of the step have the same.
        shared: whether all clients of the step have the same.
        scale: (c,) factor of each client of the step, in addition to the scaling of the model.
    """

    tensors: Mapping[str, Tensor]
    shared: bool
    scale: Tensor


@dataclass(frozen=True)
class Step:
    """The adapters of one optimizer step. Clients are sorted by `depth`, and so are their rows of a batch.

    Attributes:
        stack: the adapters of the c participating clients.
        on: (c, groups) bool, whether the client's adapters of a gate group are on.
        depth: (c,) number of blocks below the client's lowest active adapter.
        scale: (c,) factor of active adapters, in addition to the scaling of the model.
        dropout: one generator per client; empty without dropout.
        fallback: the adapters of layers that are off; None if these are the plain base.
    """

    stack: Stack
    on: np.ndarray
    depth: np.ndarray
    scale: Tensor
    dropout: Sequence[torch.Generator] = ()
    fallback: Fallback | None = None

    def __len__(self) -> int:
        return len(self.on)

    def scales(self, group: int, clients: range) -> Tensor | None:
        """Return the `scale` of `clients` as (c, 1, 1), 0 where gate `group` is off; None if it is off for all."""
        return self._where(self.on[clients.start : clients.stop, group], self.scale, clients)

    def fallback_scales(self, group: int, clients: range) -> Tensor | None:
        """Return the scale of the fallback as (c, 1, 1), 0 where gate `group` is on; None if none of it is needed."""
        if self.fallback is None:
            return None
        return self._where(~self.on[clients.start : clients.stop, group], self.fallback.scale, clients)

    def _where(self, chosen: np.ndarray, scale: Tensor, clients: range) -> Tensor | None:
        if not chosen.any():
            return None
        scale = scale[clients.start : clients.stop, None, None]
        return scale if chosen.all() else scale * on_device(chosen, scale.device)[:, None, None]


@dataclass(frozen=True)
class ClientRows:
    """The rows of one batch, client after client, each client with equally many.

    Attributes:
        shapes: rows and tokens of each client's batch without padding, for which dropout is drawn.
        targets: (c,) number of targets in each client's rows; None if all clients have equally many.
    """

    shapes: Sequence[tuple[int, int]] = ()
    targets: np.ndarray | None = None


#: module, positions of the clients in the step, A x (clients, N, r) of the inputs x of their adapters
Record = Callable[[str, np.ndarray, Tensor], None]


class ForwardContext:
    """State that the layers of a stacked model share during a forward pass.

    Attributes:
        step: the step that is computed.
        rows: the rows of its batch.
        clients: the step's clients whose rows are computed at present.
        record: called by each adapter with its inputs, as far as A lets them through; None if nobody asks for them.
    """

    step: Step
    rows: ClientRows
    clients: range
    record: Record | None

    @contextmanager
    def forward(self, step: Step, rows: ClientRows, clients: range, record: Record | None = None) -> Iterator[None]:
        """Compute `step` on `rows` inside the block, starting with the rows of `clients`."""
        self.step, self.rows, self.clients, self.record = step, rows, clients, record
        try:
            yield
        finally:
            del self.step, self.rows, self.clients, self.record


def by_client(values: Tensor, counts: np.ndarray) -> Tensor:
    """Return (targets, ...) as (c, max(counts), ...), padded with zeros; the first counts[0] are the first client's."""
    shape = len(counts), int(counts.max())
    padded = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    return padded.index_copy(0, places(counts, values.device), values).unflatten(0, shape)


def places(counts: np.ndarray, device: torch.device) -> Tensor:
    """Return (targets,) the index of each target among the c * max(counts) rows of `by_client`."""
    return on_device(np.flatnonzero(np.arange(counts.max()) < counts[:, None]), device)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return `array` on `device`, without waiting for what the device computes."""
    return torch.from_numpy(array).to(device, non_blocking=True)
