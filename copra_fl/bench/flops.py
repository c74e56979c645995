"""Count the floating point operations of a training step: matrix products only, 2 per multiplication and addition.

With n = rows x tokens, width d, intermediate size f, rank r, for a BERT block with adapters on query and value:

    forward          2n (4d^2 + 2df)  linear layers    + 4 n tokens d  attention        in every block
    adapters         2 x 2n (2dr)                                                       in blocks with active adapters
    backward         as much as forward for the linear layers (input gradients only: the base is frozen), twice as
                     much for attention and for the adapters                            above the lowest active block
    in that block    its input needs no gradient: 2n (d^2 + 2df), attention 6 n tokens d (no gradient of the keys),
                     adapters without the gradient of their input
    below it         nothing
    head             2 rows d classes forward, as much for its weights, and for its input if any adapter is on

Embeddings, norms, activations, softmax, loss and optimizer are not counted, nor the base's pooler, which is not used.
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
class EncoderShape:
    """Sizes of a BERT encoder with adapters and a classification head."""

    layers: int
    width: int
    intermediate: int
    rank: int
    classes: int


def step_flops(encoder: EncoderShape, rows: int, tokens: int, mask: Sequence[bool]) -> int:
    """Count one optimizer step on `rows` texts of `tokens` tokens, with active adapters in the blocks of `mask`."""
    n, d, f, r = rows * tokens, encoder.width, encoder.intermediate, encoder.rank
    linear, attention = 2 * n * (4 * d * d + 2 * d * f), 4 * n * tokens * d
    adapters = ADAPTERS_PER_BLOCK * 2 * n * 2 * d * r
    head = 2 * rows * d * encoder.classes
    flops = encoder.layers * (linear + attention) + 2 * head
    if not any(mask):
        return flops
    blocks_above = encoder.layers - 1 - list(mask).index(True)
    flops += head + sum(mask) * 3 * adapters
    flops += blocks_above * (linear + 2 * attention)
    return flops + 2 * n * (d * d + 2 * d * f) + 6 * n * tokens * d - adapters // 2


def block_backward(encoder: EncoderShape, rows: int, tokens: int) -> int:
    """Count the backward pass through one block: what one more block below the lowest active adapter saves a step."""
    lowest, one_up = ([layer == number for layer in range(encoder.layers)] for number in (0, 1))
    return step_flops(encoder, rows, tokens, lowest) - step_flops(encoder, rows, tokens, one_up)


def encoder_shape(config: Config) -> EncoderShape:
    base = AutoConfig.from_pretrained(config.model.model)
    return EncoderShape(base.num_hidden_layers, base.hidden_size, base.intermediate_size, config.model.rank, NUM_LABELS)


def round_masks(config: Config, data: FederatedData, server_round: int, layers: int) -> np.ndarray:
    """Return (steps, layers) bool: the active layers in each step of each client in a round."""
    plan = Plan(server_round, (), config)
    return np.concatenate([plan_steps(plan, data, client, layers).masks for client in range(len(data.train))])


def phase_flops(config: Config, data: FederatedData) -> int:
    """Count all rounds of `config`, with the masks that its clients draw."""
    encoder, rows, tokens = encoder_shape(config), config.training.batch_size, config.data.max_length
    return sum(
        step_flops(encoder, rows, tokens, mask)
        for server_round in range(1, config.federation.num_rounds + 1)
        for mask in round_masks(config, data, server_round, encoder.layers).tolist()
    )
