"""The average with client-level differential privacy (DP-FedAvg; McMahan et al., arXiv 1710.06963).

    theta <- theta_0 + (sum_k min(1, C / ||d_k||) d_k + N(0, (z C)^2)) / n,    d_k = theta_k - theta_0

n is the expected number of clients in a round, not the number of replies: adding or removing one client moves the sum
by at most C, whatever the others do. Hence all clients have the same weight. It replaces the average of a linear rule,
which is the same without noise. The norm is over all tensors that travel. Every value that can travel gets noise, even
if no client of this round trained it: otherwise the noise would reveal which clients took part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from copra_fl.adapters.state import Adapter, difference, norm, parts
from copra_fl.aggregation.rule import Outcome, Round


def clip(change: Adapter, bound: float) -> Adapter:
    """Return `change`, scaled down to the norm `bound` if it is longer."""
    share = min(1.0, bound / max(norm(change), 1e-300))
    return {name: share * tensor for name, tensor in change.items()}


def private_average(
    round_: Round, travels: Iterable[str], clip_norm: float, noise_multiplier: float, num_wanted: int, noise: int
) -> Outcome:
    """Return the private average of a round.

    Args:
        round_: the round.
        travels: parts (`adapters.state.part_of`) that clients train and send in this round.
        clip_norm: C.
        noise_multiplier: z.
        num_wanted: n.
        noise: random seed of the noise; it must be secret.
    """
    stream = torch.Generator().manual_seed(noise)
    before = {name: tensor.double() for name, tensor in sorted(parts(round_.before, travels).items())}
    changes = [difference(parts(adapter, travels), before) for adapter in round_.adapters]
    clipped = [clip(change, clip_norm) for change in changes]
    adapter = dict(round_.before)
    for name, old in before.items():
        total = noise_multiplier * clip_norm * torch.randn(old.shape, generator=stream, dtype=torch.float64)
        for change in clipped:
            total += change[name]
        adapter[name] = (old + total / num_wanted).to(round_.before[name].dtype)
    return Outcome(adapter, notes={"clipped": sum(norm(change) > clip_norm for change in changes)})
