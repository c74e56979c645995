"""Estimate the floating point operations of local training: 2 per weight and token, for the passes that are needed.

With n tokens in a step (rows x the longest text of their micro-batch) and m targets, in one pass:

    forward          2n W   of every block's frozen linear layers, W weights      in every step
                     2n a   of each gate group with a weights that is on
    backward         2n W   gradients of a block's inputs; the base is frozen     from the lowest active block on
                     4n a   gradients of an adapter's weights and inputs          of each gate group that is on
    off = "global"   2n a   forward, and for its input from the lowest active     of each gate group that is off
                            block on
    output layer     2m h   forward, h weights; as much for its weights if it is trained, and for its input if any
                            adapter is on

Below the lowest block with an adapter that is on, there is no backward pass. That block counts whole, though the inputs
of its first layers need no gradient. Frozen factors of an adapter count as if they were trained. Attention scores,
embeddings, norms, activations, optimizer, residuals and recomputed blocks (gradient-checkpointing) are not counted.
`bench.flops` counts a BERT step exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from copra_fl.copra.gates import Gates


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights that the operations of a step follow from.

    Attributes:
        blocks: frozen weights in the linear layers of each block, in forward order.
        groups: adapter weights of each gate group.
        first_block: for each gate group the number of blocks below it.
        output: weights of the layer that gives the logits.
        trains_output: whether that layer is the trained head.
    """

    blocks: tuple[int, ...]
    groups: tuple[int, ...]
    first_block: tuple[int, ...]
    output: int
    trains_output: bool

    @classmethod
    def of(
        cls,
        base: nn.Module,
        gates: Gates,
        adapter: Mapping[str, Tensor],
        group_of: Mapping[str, int],
        head: nn.Linear | None,
    ) -> ModelSize:
        """Return the sizes of a base with PEFT's adapters.

        Args:
            base: the Transformers model, with PEFT's layers in it.
            gates: its gates.
            adapter: adapter tensors by name.
            group_of: name of an adapter tensor -> index of its gate group.
            head: the trained head; None if the base's own output layer gives the logits.
        """
        blocks: dict[str, int] = {}
        for name, module in base.named_modules():
            block = gates.layers.of(name)
            if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name and block.split(".")[-1].isdigit():
                blocks[block] = blocks.get(block, 0) + _num_weights(module)
        groups, order = np.zeros(len(gates.names), dtype=int), list(blocks)
        for name, group in group_of.items():
            groups[group] += adapter[name].numel()
        below: list[int] = []
        for block in map(gates.layers.of, gates.names):
            outside = len(order) if below else 0  # in front of the first block, or behind the last one
            below.append(order.index(block) if block in blocks else outside)
        output = head if head is not None else base.get_output_embeddings()  # type: ignore[operator]
        return cls(tuple(blocks.values()), tuple(groups.tolist()), tuple(below), _num_weights(output), head is not None)


def _num_weights(linear: nn.Module) -> int:
    """Return the number of weights of a linear layer; a quantized one stores fewer numbers."""
    if isinstance(linear, nn.Linear):
        return linear.in_features * linear.out_features
    return int(linear.weight.numel())  # type: ignore[operator]


def step_flops(
    size: ModelSize,
    masks: npt.NDArray[np.bool_],
    tokens: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    falls_back: bool,
) -> npt.NDArray[np.float64]:
    """Return (steps,) the operations of one forward and backward pass of each step.

    Args:
        size: of the model.
        masks: (steps, groups) gate groups that are on.
        tokens: (steps,) tokens, with padding.
        targets: (steps,) targets.
        falls_back: whether groups that are off compute another, frozen adapter.
    """
    first_block, groups = np.asarray(size.first_block), np.asarray(size.groups, dtype=float)
    num_blocks, any_on, adapters = len(size.blocks), np.asarray(masks.any(axis=1)), masks @ groups
    from_block = np.append(np.cumsum(size.blocks[::-1])[::-1], 0)  # weights of this block and all above it
    first = np.where(masks, first_block, num_blocks).min(axis=1, initial=num_blocks)
    forward = 2 * tokens * (sum(size.blocks) + adapters) + 2 * targets * size.output
    backward = 2 * tokens * (from_block[first] + 2 * adapters) + 2 * targets * size.output * any_on
    if falls_back:
        above = ~masks & (first_block >= first[:, None]) & any_on[:, None]
        forward, backward = forward + 2 * tokens * (~masks @ groups), backward + 2 * tokens * (above @ groups)
    return np.asarray(forward + backward + 2 * targets * size.output * size.trains_output, dtype=float)
