"""Collect the Gram matrices of a round (`copra_fl.aggregation.grams`) in the forward passes of local training.

A is frozen in these rounds, so A x costs r products for each value of x, a small part of an adapter's own work. A
module that is off gets no input. Padding and rows without weight are left out, and there is no dropout, so both engines
collect the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from copra_fl.adapters.state import PEFT_PREFIX, Adapter
from copra_fl.aggregation.grams import shrunk
from copra_fl.aggregation.products import b_of
from copra_fl.models.adapted import AdaptedModel


class GramSums:
    """Sums of (A x)(A x)^T over tokens x, by module, for each of `num_clients` clients."""

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, module: str, clients: Tensor, values: Tensor, is_token: Tensor) -> None:
        """Add inputs of `module`.

        Args:
            clients: (c,) index of each client.
            values: (c, N, r), A x for each position of a client's rows.
            is_token: (c, rows, tokens), False for padding; one value per row, (c, rows, 1), covers all its positions.
        """
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if module not in self._sums:
            rank = values.shape[-1]
            self._sums[module] = values.new_zeros(self._num_clients, rank, rank), values.new_zeros(self._num_clients)
        sums, counts = self._sums[module]
        kept = _by_position(is_token, values.shape[1]).to(values.dtype)
        values = values * kept[..., None]
        sums.index_add_(0, clients, torch.bmm(values.mT, values))
        counts.index_add_(0, clients, kept.sum(1))

    def matrices(self, client: int, shrinkage: float) -> Adapter:
        """Return the client's G of each module that got a token, by the name of its B, symmetric and `shrunk`."""
        matrices = {}
        for module, (sums, counts) in self._sums.items():
            gram, tokens = sums[client].cpu(), float(counts[client])
            if tokens:
                matrices[b_of(module)] = shrunk((gram + gram.T) / (2 * tokens), tokens, shrinkage)
        return matrices


def _by_position(is_token: Tensor, number: int) -> Tensor:
    """Return (c, number): `is_token` for each position of an input with `number` positions per client.

    An input with another number of positions than the batch has tokens (one per text, or image patches) is kept row by
    row.
    """
    if is_token[0].numel() == number:
        return is_token.flatten(1)
    rows = is_token.any(-1)
    return rows.repeat_interleave(number // rows.shape[1], dim=1)


def tokens_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Return (rows, tokens) bool: False for padding; (rows, 1) of True for a batch without an attention mask."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    rows = next(iter(batch.values()))
    return torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)


@contextmanager
def recording(model: AdaptedModel, sums: GramSums | None, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Add the inputs of the model's adapters to client 0 of `sums` in a forward pass with `batch` inside the block.

    Without `sums` do nothing. A backward pass that computes blocks again must be outside.
    """
    if sums is None:
        yield
        return
    is_token = tokens_of(batch)[None]
    hooks = [
        model.base.get_submodule(name).register_forward_pre_hook(
            partial(_record, sums, f"{PEFT_PREFIX}{name}", is_token)
        )
        for name in model.gates.group_of
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _record(sums: GramSums, name: str, is_token: Tensor, module: Any, inputs: tuple[Tensor, ...]) -> None:
    if not module.disable_adapters:
        a, x = module.lora_A["default"].weight.detach(), inputs[0].detach()
        client = torch.zeros(1, dtype=torch.long, device=x.device)
        sums.add(name, client, (x.to(a.dtype) @ a.T).reshape(1, -1, len(a)), is_token)
