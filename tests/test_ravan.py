"""Heads with a trained core and scale each: the product in both engines, what a client sends, and the bases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from copra_fl.adapters.core import core_matrix
from copra_fl.adapters.state import Adapter, parts
from copra_fl.models.build import build_model
from copra_fl.models.initial_adapter import initial_adapter, orthogonal_bases
from tests.support.rounds import MODULES, aggregate, make_round, random_adapter, update
from tests.support.tiny import Settings
from tests.support.worlds import BATCH, World, assert_alike, jitter

HEADS = {"rank": 4, "rule": "ravan", "ravan.heads": 2}


def with_scaled_heads_in_a(adapter: Adapter) -> Adapter:
    """Return the plain adapter with A' = [s_1 H_1 A_1; s_2 H_2 A_2]."""
    plain = {name: tensor for name, tensor in adapter.items() if "lora_R" not in name and "lora_S" not in name}
    for name, a in plain.items():
        if "lora_A" in name:
            first, second = adapter[name.replace("lora_A", "lora_R")].chunk(2)
            s, t = adapter[name.replace("lora_A", "lora_S")]
            plain[name] = torch.cat([s * first @ a[:2], t * second @ a[2:]])
    return plain


def test_scaled_heads_equal_plain_lora_whose_a_has_them_applied(tiny: Settings) -> None:
    """Oracle: plain PEFT, for both engines, with gates open and with one closed."""
    world = World(tiny | HEADS, double=True, heads=2)
    plain = build_model(world.config.model, "layer", 3, seed=0).double()
    adapters = [world.start, jitter(world.start, 1, 0.3)]
    with torch.inference_mode():
        expected = plain.predictor([with_scaled_heads_in_a(adapter) for adapter in adapters])(BATCH)
        for model in (world.plain, world.stacked):
            assert torch.allclose(model.predictor(adapters)(BATCH), expected, atol=1e-12)
        for model in (world.plain, plain):
            model.gates.set([True, False, True])
        assert torch.allclose(world.plain(**BATCH), plain(**BATCH), atol=1e-12)


@pytest.mark.parametrize("off", ["base", "global"])
def test_both_engines_train_blocks_and_scales_alike_and_send_their_product(tiny: Settings, off: str) -> None:
    """After training alone, the model still has blocks and scales apart: their product is what the client sends."""
    settings = {"local-steps": 8, "num-rounds": 4, "lora-dropout": 0.2, "p0": 0.5, "off": off}
    world = World(tiny | HEADS | settings, double=True, heads=2)
    for together in world.together(0, 1):
        alone = world.alone(together.client)
        assert_alike(together, alone, 1e-12)
        trained = world.plain.read_adapter()
        for name, scales in parts(trained, {"S"}).items():
            blocks = name.replace("lora_S", "lora_R")
            assert (scales != world.start[name]).all()
            assert torch.equal(alone.adapter[name], torch.ones_like(scales))
            assert torch.allclose(alone.adapter[blocks], trained[blocks] * scales.repeat_interleave(2)[:, None])
        assert not parts(alone.adapter, {"A", "B"})


def test_the_average_is_that_of_the_scaled_heads() -> None:
    """p = 1/4, 3/4, heads of rank 1: R = diag(1, -2) and diag(5, 2), so diag(4, 1)."""
    fixed = random_adapter(3, core="orthogonal")
    core = f"{MODULES[0]}.lora_R.weight"
    clients = [fixed | {core: torch.tensor([[x], [y]])} for x, y in ((1.0, -2.0), (5.0, 2.0))]
    outcome = aggregate("ravan", make_round(fixed, [update(i, sent, 10 + 20 * i) for i, sent in enumerate(clients)]))
    assert core_matrix(outcome.adapter, MODULES[0]).tolist() == [[4, 0], [0, 1]]


def test_bases_are_orthonormal_over_all_heads_and_drawn_from_the_seed(tiny: Settings) -> None:
    world = World(tiny | HEADS | {"target-modules": "all-linear", "rank": 8}, heads=2)
    own = world.plain.read_adapter()
    start = initial_adapter(world.plain, world.data, world.config)
    for name, tensor in parts(start, {"A", "B"}).items():
        gram = tensor @ tensor.T if "lora_A" in name else tensor.T @ tensor
        assert np.allclose(gram, np.eye(8), atol=1e-5), name
        assert not torch.equal(tensor, own[name])
    assert all(torch.equal(start[name], tensor) for name, tensor in parts(own, {"R", "S", "head"}).items())
    assert not any(tensor.any() for tensor in parts(start, {"R"}).values()), "the first round starts from W0"
    again, other = (orthogonal_bases(own, seed) for seed in (world.config.federation.seed, 1))
    assert all(torch.equal(start[name], tensor) for name, tensor in again.items())
    assert not any(torch.equal(start[name], tensor) for name, tensor in parts(other, {"A", "B"}).items())
