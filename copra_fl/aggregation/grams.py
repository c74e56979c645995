"""Gram matrices of what A makes of an adapter's inputs, for the mean of B in `rules.ffa_lora_gram`.

    G_i = 1/T_i sum_t (A x_t)(A x_t)^T          (r, r), over the T_i tokens x_t that client i's adapter got in a round

They travel beside B, one per module that the client trained, under the name of its B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, parts


def templates(adapter: Adapter) -> Adapter:
    """Return, for each B in `adapter`, zeros of its Gram matrix's shape (r, r) under its name."""
    return {name: tensor.new_zeros(2 * tensor.shape[1:]) for name, tensor in parts(adapter, {"B"}).items()}


def shrunk(gram: Tensor, tokens: float, shrinkage: float) -> Tensor:
    """Return `gram` with the values off its diagonal multiplied by tokens / (tokens + shrinkage).

    Few tokens can make directions look related that are not. RegMean and LoRM multiply by the same factor at all
    clients.
    """
    diagonal = torch.diag(gram.diagonal())
    return diagonal + tokens / (tokens + shrinkage) * (gram - diagonal)
