"""Floating point operations that a training step needs: matrix products only, 2 for each multiplication and addition.

With n = rows x tokens, width d, intermediate size f, rank r, for a BERT block with adapters on query and value:

    forward          2n (4d^2 + 2df)  linear layers    + 4 n tokens d  attention        in every block
    adapters         2 x 2n (2dr)                                                       in blocks where they are on
    backward         as much as forward for the linear layers (input gradients only: the base is frozen), twice as
                     much for attention, and twice as much for the adapters             above the lowest active block
    in that block    its input needs no gradient: 2n (d^2 + 2df), attention 6 n tokens d (no gradient of the keys),
                     adapters without the gradient of their input
    below it         nothing
    head             2 rows d classes forward, as much for its weights, and for its input if any adapter is on

Embeddings, norms, activations, softmax, loss and optimiser are not counted, nor the base's pooler, which nobody uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import AutoConfig

from copra_fl.bench.sizes import NUM_LABELS
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.training.batches import plan_steps
from copra_fl.training.plan import Plan

ADAPTERS_PER_BLOCK = 2


@dataclass(frozen=True)
class Encoder:
    layers: int
    width: int
    intermediate: int
    rank: int
    classes: int


def step_flops(encoder: Encoder, rows: int, tokens: int, on: Sequence[bool]) -> int:
    """One optimiser step on `rows` texts of `tokens` tokens, with the adapters of the blocks `on`."""
    n, d, f, r = rows * tokens, encoder.width, encoder.intermediate, encoder.rank
    linear, attention = 2 * n * (4 * d * d + 2 * d * f), 4 * n * tokens * d
    adapters = ADAPTERS_PER_BLOCK * 2 * n * 2 * d * r
    head = 2 * rows * d * encoder.classes
    flops = encoder.layers * (linear + attention) + 2 * head
    if not any(on):
        return flops
    blocks_above = encoder.layers - 1 - list(on).index(True)
    flops += head + sum(on) * 3 * adapters
    flops += blocks_above * (linear + 2 * attention)
    return flops + 2 * n * (d * d + 2 * d * f) + 6 * n * tokens * d - adapters // 2


def block_backward(encoder: Encoder, rows: int, tokens: int) -> int:
    """What one more block below the lowest active adapter spares a step: all of the backward pass through it."""
    lowest, one_up = ([layer == number for layer in range(encoder.layers)] for number in (0, 1))
    return step_flops(encoder, rows, tokens, lowest) - step_flops(encoder, rows, tokens, one_up)


def encoder_of(config: Config) -> Encoder:
    base = AutoConfig.from_pretrained(config.model.model)
    return Encoder(base.num_hidden_layers, base.hidden_size, base.intermediate_size, config.model.rank, NUM_LABELS)


def round_masks(config: Config, data: FederatedData, server_round: int, layers: int) -> np.ndarray:
    """(steps, layers) bool: what is on in each step of each client in a round."""
    plan = Plan(server_round, (), config)
    return np.concatenate([plan_steps(plan, data, client, layers).masks for client in range(len(data.train))])


def phase_flops(config: Config, data: FederatedData) -> int:
    """All rounds of `config`, with the masks that its clients draw."""
    encoder, rows, tokens = encoder_of(config), config.training.batch_size, config.data.max_length
    return sum(
        step_flops(encoder, rows, tokens, on)
        for server_round in range(1, config.federation.num_rounds + 1)
        for on in round_masks(config, data, server_round, encoder.layers).tolist()
    )
