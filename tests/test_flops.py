"""The estimate of a step's operations: by hand, against torch's counter, and against the exact count for BERT."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from copra_fl.config import Config
from copra_fl.models.flops import ModelSize, step_flops
from copra_fl.training.batches import LocalSteps
from copra_fl.training.operations import local_flops
from tests.support.tiny import Settings
from tests.support.worlds import World

#: three blocks of 100, 200 and 300 weights with adapters of 10, 20 and 30 weights, and a head of 7 weights
SIZE = ModelSize(
    blocks=(100, 200, 300), groups=(10, 20, 30), first_block=(0, 1, 2), output=7, trains_output=True
)  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "forward", "backward"),
    [
        ([1, 1, 1], 600 + 60, 600 + 2 * 60),
        ([0, 1, 0], 600 + 20, 500 + 2 * 20),
        ([0, 0, 1], 600 + 30, 300 + 2 * 30),
        ([1, 0, 1], 600 + 40, 600 + 2 * 40),
        ([0, 0, 0], 600, 0),
    ],
)
def test_a_step_by_hand(mask: list[int], forward: int, backward: int) -> None:
    """5 tokens, 2 targets, 2 operations per weight; the head: forward, its weights, and its input if a layer is on."""
    head = 2 * 2 * 7 * (3 if any(mask) else 2)
    flops = step_flops(SIZE, np.array([mask], dtype=bool), np.array([5]), np.array([2]), falls_back=False)
    assert flops.tolist() == [2 * 5 * (forward + backward) + head]


def test_a_frozen_adapter_in_place_of_one_that_is_off_by_hand() -> None:
    """The second of three groups is on. Forward: 10 and 30 weights more; backward: the input of the third, 30."""
    mask, tokens, targets = np.array([[False, True, False]]), np.array([5]), np.array([2])
    with_base, with_global = (step_flops(SIZE, mask, tokens, targets, falls_back) for falls_back in (False, True))
    assert (with_global - with_base).tolist() == [2 * 5 * (10 + 30 + 30)]
    none = np.zeros((1, 3), dtype=bool)
    with_base, with_global = (step_flops(SIZE, none, tokens, targets, falls_back) for falls_back in (False, True))
    assert (with_global - with_base).tolist() == [2 * 5 * (10 + 20 + 30)], "no adapter is on: forward only"


def drawn(batches: list[list[np.ndarray]], masks: np.ndarray) -> LocalSteps:
    ones = np.ones(len(batches))
    return LocalSteps(0, batches, masks, scales=ones, rank_scale=1.0, positions=ones, t=0 * ones)


class Texts:
    """Four texts; a mixture of lengths and numbers of targets."""

    lengths, num_targets = np.array([7, 2, 3, 4]), np.array([1, 2, 3, 4])


def test_tokens_are_rows_times_the_longest_text_of_a_micro_batch() -> None:
    """Steps of 2 x 7 + 1 x 3 and of 2 x 4 tokens, all adapters off, no trained head: 2 x 600 and 2 x 7 per target.

    FedGuCci computes everything once more for each anchor.
    """
    frozen = ModelSize((600,), (10,), (0,), output=7, trains_output=False)
    steps = drawn([[np.array([0, 1]), np.array([2])], [np.array([3, 1])]], np.zeros((2, 1), dtype=bool))
    once = 2 * 600 * (17 + 8) + 2 * 7 * (6 + 6)
    assert local_flops(Config(), frozen, steps, Texts()) == once
    assert local_flops(Config().changed(gucci_beta=0.1), frozen, steps, Texts()) == 2 * once
    assert local_flops(Config().changed(gucci_beta=0.1), frozen, steps, Texts(), num_anchors=3) == 4 * once


def test_the_estimate_differs_from_torchs_count_by_the_named_parts_only(tiny: Settings) -> None:
    """BERT with adapters on query and value: attention is not estimated, the lowest block's first layers are too high.

    Attention takes 4 n T d in every block, and twice as much backward, in the lowest block 6 n T d (the keys need no
    gradient). There, the inputs of query, key, value and of two A need no gradient: 2 n (3 d d + 2 r d) too much. The
    base also computes its pooler, 2 d d per row.
    """
    world = World(tiny | {"attention": "eager"})
    model, examples = world.plain, world.data.examples
    indices = world.data.train[0][:6]
    rows, longest = len(indices), int(examples.lengths[indices].max())
    tokens, width, rank = rows * longest, model.base.config.hidden_size, world.config.model.rank
    model.train_only({"A", "B", "head"})
    for mask in ([True, True, True], [False, True, False], [False, False, True]):
        model.gates.set(mask)
        with FlopCounterMode(display=False) as counter:
            model.losses(examples.batch(indices)).sum().backward()
        above = len(mask) - 1 - mask.index(True)
        not_estimated = (4 * len(mask) + 8 * above + 6) * tokens * longest * width + 2 * rows * width * width
        too_high = 2 * tokens * (3 * width * width + 2 * rank * width)
        estimated = local_flops(world.config, model.size, drawn([[indices]], np.array([mask])), examples)
        assert counter.get_total_flops() == estimated + not_estimated - too_high, mask


def test_an_adapter_behind_the_blocks_needs_no_backward_pass_of_a_block(tiny: Settings) -> None:
    """all-linear adapts the pooler too, which has its own gate and is computed after the 3 blocks."""
    size = World(tiny | {"target-modules": "all-linear", "pooling": "pooler"}).plain.size
    assert size.first_block == (0, 1, 2, 3)
    mask = np.array([[False, False, False, True]])
    flops = step_flops(size, mask, np.array([1]), np.array([0]), falls_back=False)
    assert flops.tolist() == [2 * (sum(size.blocks) + 3 * size.groups[3])]


def test_a_frozen_output_layer_costs_no_gradient_of_its_weights() -> None:
    frozen = ModelSize(SIZE.blocks, SIZE.groups, SIZE.first_block, SIZE.output, trains_output=False)
    mask, tokens, targets = np.ones((1, 3), dtype=bool), np.array([5]), np.array([2])
    trained_too, alone = (step_flops(size, mask, tokens, targets, falls_back=False) for size in (SIZE, frozen))
    assert trained_too - alone == 2 * 2 * 7
