"""FFA-LoRA with the Gram mean: A is frozen, and the mean of B keeps the clients' outputs (ours, after LoRM).

    A = A_0 for all clients in all rounds,    G_i = mean of (A x_t)(A x_t)^T over the inputs x_t of client i's adapter
    B <- argmin_B sum_i p_i mean_t ||(B - B_i) A x_t||^2 = (sum_i p_i B_i G_i)(sum_i p_i G_i)^+
       = B' + (sum_i p_i (B_i - B') G_i)(sum_i p_i G_i)^+,    B' = sum_i p_i B_i

FFA-LoRA: Sun et al., arXiv 2403.12313. Regression mean: Jin et al., arXiv 2212.09849; for LoRA, LoRM: Salami et al.,
arXiv 2410.17961. The plain average B' is nearest to the clients in weights; this mean is nearest in what the adapters
add to hidden states, each client measured on its own inputs. LoRM sends k x k matrices, in the authors' code from one
pass over all local data after the training; under a common A, r x r are enough. Here they are collected in training:
from all steps in which the module was on, without padding and dropout (`copra_fl.training.grams`).

The last form gives the plain average in directions without inputs, where the one before gives 0. A client that did not
train a module has no inputs there and does not count. The two sums are enough, so updates can be pooled. Not robust: a
client can send a huge G_i. Traffic per module: up r d + r^2, down r d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from copra_fl.adapters.state import Adapter, Update, parts
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import weighted_average
from copra_fl.aggregation.rules.ffa_lora import trained_parts
from copra_fl.aggregation.weighting import tensor_weights

#: eigenvalues of sum_i p_i G_i, relative to the largest, that count as 0: rounding errors of float32
TOLERANCE = 1e-6


def gram_average(round_: Round) -> Outcome:
    """Return the Gram mean of each B and the average of everything else."""
    adapter, _ = gram_means(round_.before, round_.updates, round_.settings.weighting, round_.group_of)
    return Outcome(adapter)


def gram_means(
    global_adapter: Adapter, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]
) -> tuple[Adapter, Adapter]:
    """Return the weighted average with the Gram mean in place of each B, and sum_i p_i G_i by the name of its B.

    A B without any Gram matrix is the plain average.
    """
    updates = sorted(updates, key=lambda update: update.client)
    averaged = weighted_average(global_adapter, updates, weighting, group_of)
    totals: Adapter = {}
    for name, average in parts(averaged, {"B"}).items():
        weights = tensor_weights(name, updates, weighting, group_of)
        terms = [
            (float(weight) * update.grams[name].double(), update.adapter[name].double())
            for weight, update in zip(weights, updates, strict=True)
            if name in update.grams
        ]
        if terms:
            total = torch.stack([gram for gram, _ in terms]).sum(0)
            correction = torch.stack([(b - average.double()) @ gram for gram, b in terms]).sum(0)
            inverse = torch.linalg.pinv(total, hermitian=True, rtol=TOLERANCE)
            averaged[name] = (average.double() + correction @ inverse).to(average.dtype)
            totals[name] = total.to(average.dtype)
    return averaged, totals


RULE = Rule("ffa-lora-gram", gram_average, trains=trained_parts, linear=True, grams=True)
