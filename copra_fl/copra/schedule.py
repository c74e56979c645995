"""The schedule and the masks of CopRA as pure functions.

    p(t) = min(1, p0 + (1 - p0) t / ramp),    delta_l ~ Bernoulli(p(t)), independent per layer

(CopRA, arXiv 2410.22911.) delta_l = 1 means that the adapter of layer l is on. p can rise to p1 instead of 1; p0 = p1
is stochastic depth at a fixed rate. Progress t in [0, 1) runs over the whole federation, so the schedule continues from
round to round instead of restarting.
"""

from __future__ import annotations

import numpy as np

from copra_fl.config import CopraConfig
from copra_fl.seeding import generator


def probability(t: float, p0: float, ramp: float, p1: float = 1.0) -> float:
    """Return p(t), the probability that a layer is on at progress `t`."""
    return min(p1, p0 + (p1 - p0) * t / ramp)


def progress(copra: CopraConfig, step: int, num_steps: int, server_round: int, num_rounds: int) -> float:
    """Return t in [0, 1) at local step `step` (from 0) of round `server_round` (from 1).

    With ``mask-scope = "round"`` a mask holds for the whole round, and t is the middle of the round.
    """
    within = 0.5 if copra.mask_scope == "round" else step / num_steps
    return within if copra.schedule_progress == "local" else (server_round - 1 + within) / num_rounds


def inclusion(p: float, num_groups: int, min_active: int) -> float:
    """Return the probability that a given group is on in a mask of `sample_mask`.

    With min_active = 1: p / (1 - (1-p)^L) = 1 / sum_{i<L} (1-p)^i, which tends to 1/L as p -> 0.
    """
    return p if min_active == 0 else 1.0 / float(np.sum((1.0 - p) ** np.arange(num_groups)))


def sample_mask(p: float, uniforms: np.ndarray, min_active: int) -> np.ndarray:
    """Return one mask: bool, for each group a number from `uniforms`, which are drawn from [0, 1).

    ``min_active = 1`` draws from the exact distribution conditioned on at least one group being on, also at p = 0: the
    first active group is i with probability proportional to (1-p)^(i-1), the groups after it are independent.
    """
    mask = uniforms < p
    if min_active == 1:
        weights = np.cumsum((1.0 - p) ** np.arange(len(mask)))
        first = int(np.searchsorted(weights, uniforms[0] * weights[-1], side="right"))
        mask[:first] = False
        mask[first] = True
    return mask


def scales(copra: CopraConfig, masks: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return (steps,) the factor of active adapters in each step of `client_masks`.

    It is 1, or with ``rescale`` 1 / `inclusion`.
    """
    factors, has_active = np.ones(len(masks)), masks.any(axis=1)
    if copra.rescale:
        factors[has_active] = [1 / inclusion(p, masks.shape[1], copra.min_active) for p in probabilities[has_active]]
    return factors


def client_masks(
    copra: CopraConfig,
    seed: int,
    client: int,
    num_steps: int,
    num_groups: int,
    server_round: int,
    num_rounds: int,
    trained: np.ndarray | slice = slice(None),
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the masks of one client in one round, and return them with the probabilities used.

    The masks are bool of shape (num_steps, number of `trained`), the probabilities float of shape (num_steps,). p is 0
    if only the head is trained, and 1 for every other local training but CopRA. Masks have their own random stream for
    each client and round, or with ``mask-scope = "shared"`` for each round: then clients agree on the groups that both
    train, unless ``min-active = 1`` switches one of them on.

    Args:
        num_groups: number of gate groups of the model.
        trained: those that the client trains in this round; all of them by default.
    """
    if copra.local_training != "copra":
        p = 0.0 if copra.local_training == "head" else 1.0
        return np.full((num_steps, num_groups), p == 1.0)[:, trained], np.full(num_steps, p)
    names = ("mask", server_round) if copra.mask_scope == "shared" else ("mask", server_round, client)
    number = 1 if copra.mask_scope == "round" else num_steps
    drawn = generator(seed, *names).random((number, num_groups))[:, trained]
    uniforms = np.broadcast_to(drawn, (num_steps, drawn.shape[1]))
    probabilities = np.array(
        [
            probability(progress(copra, step, num_steps, server_round, num_rounds), copra.p0, copra.ramp, copra.p1)
            for step in range(num_steps)
        ]
    )
    masks = [sample_mask(p, row, copra.min_active) for p, row in zip(probabilities, uniforms, strict=True)]
    return np.stack(masks), probabilities
