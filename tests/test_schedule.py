"""p(t) at its corners, mask frequencies against closed forms, scopes of the random streams."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from copra_fl.config import Config, CopraConfig
from copra_fl.copra.layers import trained_layers
from copra_fl.copra.schedule import client_masks, inclusion, probability, progress, sample_mask
from copra_fl.training.batches import draw_masks
from copra_fl.training.plan import Plan


@pytest.mark.parametrize(
    ("t", "p0", "ramp", "expected"),
    [
        (0.0, 0.0, 0.75, 0.0),
        (0.375, 0.0, 0.75, 0.5),
        (0.75, 0.0, 0.75, 1.0),
        (0.99, 0.0, 0.75, 1.0),
        (0.0, 0.1, 0.75, 0.1),
        (0.375, 0.1, 0.75, 0.55),  # half way from 0.1 to 1
        (0.5, 1.0, 0.75, 1.0),
        (0.25, 0.0, 1.0, 0.25),
    ],
)
def test_probability_at_its_corners(t: float, p0: float, ramp: float, expected: float) -> None:
    assert probability(t, p0, ramp) == pytest.approx(expected)


@pytest.mark.parametrize(("t", "expected"), [(0.0, 0.2), (0.25, 0.4), (0.5, 0.6), (0.9, 0.6)])
def test_probability_rises_to_p1(t: float, expected: float) -> None:
    assert probability(t, p0=0.2, ramp=0.5, p1=0.6) == pytest.approx(expected)


def test_mean_probability_is_its_closed_form() -> None:
    """The mean of p over t in [0, 1) is 1 - ramp (1 - p0) / 2: 0.625 for CopRA."""
    t = (np.arange(10_000) + 0.5) / 10_000
    assert np.mean([probability(x, 0.0, 0.75) for x in t]) == pytest.approx(0.625, abs=1e-4)
    assert np.mean([probability(x, 0.1, 0.5) for x in t]) == pytest.approx(1 - 0.5 * 0.9 / 2, abs=1e-4)


def test_progress_runs_over_the_federation_or_restarts_each_round() -> None:
    federation, local = CopraConfig("copra"), CopraConfig("copra", schedule_progress="local")
    assert progress(federation, step=0, num_steps=10, server_round=1, num_rounds=4) == 0.0
    assert progress(federation, step=5, num_steps=10, server_round=3, num_rounds=4) == pytest.approx(2.5 / 4)
    assert progress(local, step=5, num_steps=10, server_round=3, num_rounds=4) == 0.5
    middle = CopraConfig("copra", mask_scope="round")
    assert progress(middle, step=0, num_steps=10, server_round=1, num_rounds=4) == pytest.approx(0.5 / 4)


def conditional_distribution(p: float, num_groups: int) -> dict[tuple[bool, ...], float]:
    """Return the distribution of independent masks given that at least one group is on, by enumeration."""
    masks = [mask for mask in itertools.product((False, True), repeat=num_groups) if any(mask)]
    weights = {mask: np.prod([p if on else 1 - p for on in mask]) for mask in masks}
    total = sum(weights.values())
    return {mask: float(weight / total) for mask, weight in weights.items()}


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 1.0])
def test_min_active_draws_from_the_exact_conditional_distribution(p: float) -> None:
    rng, draws = np.random.default_rng(0), 40_000
    masks = np.stack([sample_mask(p, rng.random(3), 1) for _ in range(draws)])
    for mask, expected in conditional_distribution(p, 3).items():
        frequency = float((masks == mask).all(1).mean())
        assert frequency == pytest.approx(expected, abs=4 * np.sqrt(0.25 / draws))
    assert masks.mean(0) == pytest.approx([inclusion(p, 3, 1)] * 3, abs=0.01)


@pytest.mark.parametrize("p", [0.0, 1e-12])
def test_min_active_is_uniform_as_p_vanishes(p: float) -> None:
    rng, draws = np.random.default_rng(1), 20_000
    masks = np.stack([sample_mask(p, rng.random(4), 1) for _ in range(draws)])
    assert (masks.sum(1) == 1).all()
    assert masks.mean(0) == pytest.approx([0.25] * 4, abs=0.015)
    assert inclusion(p, 4, 1) == pytest.approx(0.25)


def test_without_min_active_layers_are_independent() -> None:
    rng = np.random.default_rng(2)
    masks = np.stack([sample_mask(0.3, rng.random(3), 0) for _ in range(40_000)])
    assert masks.mean(0) == pytest.approx([0.3] * 3, abs=0.01)
    assert (masks[:, 0] & masks[:, 2]).mean() == pytest.approx(0.09, abs=0.01)
    assert (~masks.any(1)).mean() == pytest.approx(0.7**3, abs=0.01)


def masks_of(copra: CopraConfig, client: int = 0, server_round: int = 1) -> np.ndarray:
    return client_masks(copra, 0, client, 20, 6, server_round, num_rounds=4)[0]


def test_mask_scopes() -> None:
    step, shared, whole = (CopraConfig("copra", p0=0.5, mask_scope=scope) for scope in ("step", "shared", "round"))
    assert not np.array_equal(masks_of(step, client=0), masks_of(step, client=1))
    assert np.array_equal(masks_of(shared, client=0), masks_of(shared, client=1))
    assert not np.array_equal(masks_of(shared, server_round=1), masks_of(shared, server_round=2))
    assert (masks_of(whole) == masks_of(whole)[0]).all()
    assert len({tuple(masks_of(whole, client=client)[0]) for client in range(20)}) > 5


def layers_on(flat: dict[str, object], client: int) -> np.ndarray:
    """Return the masks of 20 steps over the 6 layers of a model."""
    config = Config.from_flat({"local-training": "copra", "p0": 0.3, "num-clients": 3} | flat)
    return draw_masks(Plan(2, (0, 1, 2), config), client, 20, 6)[0]


@pytest.mark.parametrize("allocation", ["top", "random"])
def test_clients_of_unequal_depth_share_the_masks_of_their_common_layers(allocation: str) -> None:
    flat = {"client-depths": "2,4,6", "depth-allocation": allocation, "mask-scope": "shared"}
    masks = [layers_on(flat, client) for client in range(3)]
    trained = [trained_layers(Config.from_flat({"num-clients": 3} | flat), 6, 2, client) for client in range(3)]
    for client in (0, 1):
        common = trained[client]
        assert np.array_equal(masks[client][:, common], masks[2][:, common]), "the deepest client trains all layers"
        assert masks[client].sum() == masks[client][:, common].sum() > 0
    assert not np.array_equal(masks[0], layers_on(flat | {"mask-scope": "step"}, 0))


def test_plain_lora_and_head_training_draw_no_masks() -> None:
    assert masks_of(CopraConfig(local_training="lora")).all()
    assert not masks_of(CopraConfig(local_training="head")).any()


def test_over_a_whole_run_the_share_of_active_layers_is_the_closed_form() -> None:
    masks = [
        client_masks(CopraConfig("copra"), 7, client, 50, 6, server_round, num_rounds=4)[0]
        for client in range(20)
        for server_round in range(1, 5)
    ]
    assert np.concatenate(masks).mean() == pytest.approx(0.625, abs=0.01)
