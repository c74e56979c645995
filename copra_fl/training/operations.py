"""Count the operations of a client's local training (`models.flops`) from the steps that it draws."""

from __future__ import annotations

import numpy as np

from copra_fl.config import Config
from copra_fl.models.flops import ModelSize, step_flops
from copra_fl.tasks import Examples
from copra_fl.training.batches import LocalSteps
from copra_fl.training.points import step_points


def local_flops(config: Config, size: ModelSize, steps: LocalSteps, examples: Examples, num_anchors: int = 1) -> float:
    """Return the operations of a client's steps in a round.

    A step computes everything once for each of its points (`points.step_points`): 1 + `num_anchors` with FedGuCci.
    """
    lengths, num_targets = examples.lengths, examples.num_targets
    tokens = [sum(len(indices) * int(lengths[indices].max()) for indices in step) for step in steps.batches]
    targets = [sum(int(num_targets[indices].sum()) for indices in step) for step in steps.batches]
    falls_back = config.copra.off == "global"
    of_steps = step_flops(size, steps.masks, np.array(tokens), np.array(targets), falls_back)
    return sum(
        len(step_points(config, position, num_anchors)) * float(flops)
        for position, flops in zip(steps.positions, of_steps, strict=True)
    )
