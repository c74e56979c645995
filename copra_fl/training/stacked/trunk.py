"""Truncated backward pass: blocks below a client's lowest active adapter are not in the autograd graph.

    block 2    [ c0 c0 | c1 c1 | c2 c2 ]   all in the graph
    block 1    [ c0 c0 | c1 c1 ]  c2 c2    the lowest active adapter of c2 is in block 2: its rows pass without a graph
    block 0    [ c0 c0 ]  c1 c1   c2 c2

Rows are sorted by that depth, so the rows in the graph always come first. The others pass without a graph, through the
plain base or with the step's `Fallback`. Rows can join the graph below that depth, where it saves time (`num_joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from copra_fl.training.stacked.chain import Chain
from copra_fl.training.stacked.step import ClientRows, ForwardContext, Step

#: number of a client's tokens in a step from which clients join the graph one by one
LARGE_CLIENT = 512

#: inputs of a block after the hidden states, by position (from 1 on) or name
Inputs = dict[Any, Any]


class Trunk(nn.Module):
    """Replacement for the base's blocks that runs each row without a graph up to the depth at which its client joins.

    With `recomputed`, the backward pass computes the blocks again (`AdaptedModel.recompute_blocks`).
    """

    def __init__(self, blocks: Sequence[nn.Module], chain: Chain, context: ForwardContext, recomputed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.chain = chain
        self.context = context
        self.recomputed = recomputed

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        context, num_rows = self.context, len(hidden)
        step = context.step
        inputs: Inputs = {**dict(enumerate(args, start=1)), **kwargs}
        num_clients = len(step)
        per_client = num_rows // num_clients
        live, frozen = hidden[:0], hidden
        for depth, block in enumerate(self.blocks):
            joined = num_joined(step.depth, depth, per_client * hidden.shape[1])
            fresh = joined * per_client - len(live)
            live, frozen = _append(live, frozen[:fresh]), frozen[fresh:]
            first = joined * per_client
            if len(frozen):
                context.clients = range(joined, num_clients)
                with torch.no_grad():
                    frozen = _run(block, frozen, self._rows(inputs, slice(first, None), num_rows))
            if len(live):
                context.clients = range(joined)
                live = self._live(block, live, self._rows(inputs, slice(0, first), num_rows))
        context.clients = range(num_clients)
        hidden = _append(live, frozen)
        return hidden if self.chain.extras is None else (hidden, *self.chain.extras)

    def _live(self, block: nn.Module, hidden: Tensor, inputs: Inputs) -> Tensor:
        """Run `block` on the rows in the graph."""
        if not self.recomputed:
            return _run(block, hidden, inputs)
        context = self.context
        streams = [stream.get_state() for stream in context.step.dropout]
        contexts = nullcontext(), self._again(context.step, context.rows, context.clients, streams)
        return _run(partial(block, context_fn=lambda: contexts, preserve_rng_state=False), hidden, inputs)

    @contextmanager
    def _again(self, step: Step, rows: ClientRows, clients: range, streams: Sequence[Tensor]) -> Iterator[None]:
        """Restore the step and its dropout streams for a block that the backward pass computes again."""
        later = [stream.get_state() for stream in step.dropout]
        _set_states(step.dropout, streams)
        try:
            with self.context.forward(step, rows, clients):
                yield
        finally:
            _set_states(step.dropout, later)

    def _rows(self, inputs: Inputs, chosen: slice, num_rows: int) -> Inputs:
        """Return `inputs`, where inputs with a row for each of `num_rows` examples are cut to the `chosen` rows."""
        with_rows = self.chain.with_rows
        return {key: _rows(value, chosen, num_rows) if key in with_rows else value for key, value in inputs.items()}


def num_joined(depths: np.ndarray, block: int, tokens: int) -> int:
    """Return the number of clients in the graph at `block`, at least those whose depth it has reached.

    `depths` are ascending, `tokens` the number of each client in the step. Large clients join one by one, all others in
    two halves: with each further number of rows a CPU needs new kernels for all products of a block (0.5 ms and 0.5 MB
    each), which costs small clients more than it saves (experiments/LOG.md).
    """
    reached, number = int(np.searchsorted(depths, block, side="right")), len(depths)
    parts = number if tokens >= LARGE_CLIENT else 2
    return -(-reached * parts // number) * number // parts


def _set_states(streams: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for stream, state in zip(streams, states, strict=True):
        stream.set_state(state)


def _run(block: Callable[..., Any], hidden: Tensor, inputs: Inputs) -> Tensor:
    args = [value for key, value in inputs.items() if isinstance(key, int)]
    output = block(hidden, *args, **{key: value for key, value in inputs.items() if isinstance(key, str)})
    return output[0] if isinstance(output, tuple) else output


def _append(rows: Tensor, more: Tensor) -> Tensor:
    if not len(rows) or not len(more):
        return rows if len(rows) else more
    return torch.cat([rows, more])


def _rows(value: Any, chosen: slice, num_rows: int) -> Any:
    """Return the `chosen` rows of an input. A tensor that all `num_rows` examples share has one row and stays whole."""
    if isinstance(value, Tensor):
        return value[chosen] if len(value) == num_rows else value
    return type(value)(_rows(item, chosen, num_rows) for item in value) if isinstance(value, tuple | list) else value
