"""The average with client-level differential privacy (DP-FedAvg; McMahan et al., arXiv 1710.06963).

    theta <- theta_0 + (sum_k min(1, C / ||d_k||) d_k + N(0, (z C)^2)) / n,    d_k = theta_k - theta_0

n is the expected number of clients in a round, not the number of replies: adding or removing one client moves the sum
by at most C, whatever the others do. Hence all clients have the same weight. It replaces the average of a linear rule,
which is the same without noise. The norm is over all tensors that travel. Every value that can travel gets noise, even
if no client of this round trained it: otherwise the noise would reveal which clients took part.

Changes and noise are whole multiples of C / 2^24. A client's clipped change is rounded towards zero, so that it gets no
longer; sums are exact. Noise is rounded to the nearest multiple, which is the same as rounding the noisy sum: the
accountant's Gaussian mechanism with a step behind it that can only hide. The published number is therefore no trace of
how the floating-point numbers were drawn (Mironov, CCS 2012).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, difference, norm, parts
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.secret_random import normals

#: steps of the grid in the clipping norm
STEPS = 2**24


def clip(change: Adapter, bound: float) -> Adapter:
    """Return `change`, scaled down to the norm `bound` if it is longer."""
    share = min(1.0, bound / max(norm(change), 1e-300))
    return {name: share * tensor for name, tensor in change.items()}


def private_average(
    round_: Round, travels: Iterable[str], clip_norm: float, noise_multiplier: float, num_wanted: int
) -> Outcome:
    """Return the private average of a round; its noise comes from `secret_random`.

    Args:
        round_: the round.
        travels: parts (`adapters.state.part_of`) that clients train and send in this round.
        clip_norm: C.
        noise_multiplier: z.
        num_wanted: n.
    """
    before = parts(round_.before, travels)
    start = {name: tensor.double() for name, tensor in sorted(before.items())}
    changes = [difference(parts(adapter, travels), start) for adapter in round_.adapters]
    clipped = [clip(change, clip_norm) for change in changes]
    step = clip_norm / STEPS
    total: Adapter = {}
    for name, old in start.items():
        steps = grid_noise(old.shape, noise_multiplier * STEPS)
        for change in clipped:
            steps += (change[name] / step).to(torch.int64)  # towards zero
        total[name] = steps * step
    adapter = moved(round_.before, total, num_wanted)
    return Outcome(adapter, notes={"clipped": sum(norm(change) > clip_norm for change in changes)})


def moved(before: Adapter, total: Adapter, num_wanted: int) -> Adapter:
    """Return the adapter `before`, moved by the noisy sum `total` (float64) of changes, divided by `num_wanted`."""
    after = {name: before[name].double() + change / num_wanted for name, change in total.items()}
    return before | {name: tensor.to(before[name].dtype) for name, tensor in after.items()}


def grid_noise(shape: torch.Size, deviation: float) -> torch.Tensor:
    """Return Gaussian noise of standard deviation `deviation`, rounded to whole numbers (int64)."""
    return torch.from_numpy(np.rint(deviation * normals(shape.numel())).astype(np.int64)).reshape(shape)
