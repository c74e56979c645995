"""W0 + s B R A: the core between the factors, and factors from the first gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from copra_fl.adapters.state import part_of
from copra_fl.models.build import build_model
from copra_fl.models.fed_sb_init import base_gradients, core_start, leading_directions
from copra_fl.tasks.classification import pool
from copra_fl.training.evaluation import evaluate
from tests.support.tiny import Settings
from tests.support.worlds import BATCH, World, jitter


def test_a_model_with_a_core_equals_plain_lora_with_factor_r_a(tiny: Settings) -> None:
    """Oracle: plain PEFT with A' = R A, for gates open and closed and for both engines."""
    world = World(tiny, double=True, heads=1)
    plain = build_model(world.config.model, "layer", 3, seed=0).double()
    adapters = [world.start, jitter(world.start, 1, 0.3)]
    folded = [
        {
            name: adapter[name.replace("lora_A", "lora_R")] @ tensor if part_of(name) == "A" else tensor
            for name, tensor in adapter.items()
            if part_of(name) != "R"
        }
        for adapter in adapters
    ]
    with torch.inference_mode():
        expected = plain.predictor(folded)(BATCH)
        for model in (world.plain, world.stacked):
            assert torch.allclose(model.predictor(adapters)(BATCH), expected, atol=1e-12)
        for model in (world.plain, plain):
            model.gates.set([True, False, True])
        assert torch.allclose(world.plain(**BATCH), plain(**BATCH), atol=1e-12)


def test_a_core_starts_at_zero_in_the_gate_of_its_layer_and_changes_no_other_start(tiny: Settings) -> None:
    world = World(tiny, heads=1)
    start = world.plain.read_adapter()
    without = build_model(world.config.model, "layer", 3, seed=0).read_adapter()
    cores = {name: tensor for name, tensor in start.items() if part_of(name) == "R"}
    assert start.keys() - cores.keys() == without.keys()
    assert all(torch.equal(start[name], tensor) for name, tensor in without.items())
    assert len(cores) == 6
    assert all(tensor.shape == (2, 2) and not tensor.any() for tensor in cores.values())
    assert all(world.plain.group_of[name] == int(name.split(".layer.")[1][0]) for name in cores)


@pytest.mark.parametrize("target", ["query,value", "all-linear"])
def test_gradients_equal_those_of_an_unfrozen_base(tiny: Settings, target: str) -> None:
    """Oracle: Transformers' base without adapters and with all parameters trained, on one batch of all examples."""
    world = World(tiny | {"target-modules": target}, heads=1)
    indices = world.data.server_validation[:50]
    world.plain.write_adapter(jitter(world.start, 1, 0.5))
    base = AutoModel.from_pretrained(str(tiny["model"]), attn_implementation="eager").eval()
    batch = world.data.examples.batch(indices)
    hidden = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = world.plain.head(pool(hidden, batch["attention_mask"], "mean", None))
    F.cross_entropy(logits, batch["labels"]).backward()
    gradients = base_gradients(world.plain, world.data.examples, indices, batch_size=16)
    assert gradients.keys() == world.plain.linears.keys()
    for name, gradient in gradients.items():
        expected = base.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        assert torch.allclose(gradient, expected, atol=1e-5 * float(expected.norm())), name


def test_the_factors_span_the_best_approximation_of_the_gradient(tiny: Settings) -> None:
    world = World(tiny, heads=1)
    indices = world.data.server_validation
    start = core_start(world.plain, world.data.examples, indices, 16)
    again = core_start(world.plain, world.data.examples, indices, 16)
    assert all(torch.equal(tensor, again[name]) for name, tensor in start.items())
    assert {name: tensor.shape for name, tensor in start.items()} == {n: t.shape for n, t in world.start.items()}
    for name, gradient in base_gradients(world.plain, world.data.examples, indices, 16).items():
        b, a, r = (start[f"{name}.lora_{part}.weight"] for part in "BAR")
        assert torch.allclose(b.T @ b, torch.eye(2), atol=1e-5)
        assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-5)
        left, values, right = torch.linalg.svd(gradient.double())
        best = left[:, :2] * values[:2] @ right[:2]
        assert torch.allclose((b @ b.T @ gradient @ a.T @ a).double(), best, atol=1e-5 * float(values[0]))
        assert not r.any()
        assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()
    head = world.plain.read_adapter()
    assert all(torch.equal(start[name], head[name]) for name in ("head.weight", "head.bias"))


def test_a_rank_above_the_width_of_the_model_leaves_the_rest_of_the_factors_zero(tiny: Settings) -> None:
    world = World(tiny | {"rank": 40}, heads=1)
    start = core_start(world.plain, world.data.examples, world.data.server_validation, 16)
    assert {name: tensor.shape for name, tensor in start.items()} == {
        name: tensor.shape for name, tensor in world.plain.read_adapter().items()
    }
    for name, a in start.items():
        if ".lora_A." in name:
            torch.testing.assert_close(a @ a.T, torch.diag((a != 0).any(dim=1).float()), atol=1e-5, rtol=0)


def test_the_sign_of_the_directions_does_not_depend_on_the_decomposition() -> None:
    matrix = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = leading_directions(matrix, 3)
    shuffled = np.random.default_rng(0).permutation(9)
    assert torch.allclose(leading_directions(matrix[shuffled], 3)[0], left[shuffled])
    assert torch.allclose(leading_directions(matrix[shuffled], 3)[1], right)


def test_the_start_is_the_base_and_a_step_along_the_gradient_lowers_the_loss(tiny: Settings) -> None:
    world = World(tiny, heads=1)
    indices = world.data.server_validation
    start = core_start(world.plain, world.data.examples, indices, 16)
    downhill = dict(start)
    for name, gradient in base_gradients(world.plain, world.data.examples, indices, 16).items():
        b, a = (start[f"{name}.lora_{part}.weight"] for part in "BA")
        downhill[f"{name}.lora_R.weight"] = -b.T @ gradient @ a.T
    before, after = evaluate(world.stacked, [start, downhill], world.data.examples, indices, 60)
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_unchanged_and_frozen_afterwards(tiny: Settings, dtype: str) -> None:
    world = World(tiny | {"dtype": dtype}, heads=1)
    before = {name: linear.weight.clone() for name, linear in world.plain.linears.items()}
    start = core_start(world.plain, world.data.examples, world.data.server_validation, 16)
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    for name, linear in world.plain.linears.items():
        assert torch.equal(linear.weight, before[name])
        assert str(linear.weight.dtype) == f"torch.{dtype}"
        assert not linear.weight.requires_grad
        assert linear.weight.grad is None
    gradients = base_gradients(world.plain, world.data.examples, world.data.server_validation, 16)
    exact = World(tiny, heads=1)
    for name, expected in base_gradients(exact.plain, exact.data.examples, exact.data.server_validation, 60).items():
        assert gradients[name].dtype == torch.float32
        tolerance = 1e-4 if dtype == "float32" else 0.1
        assert float((gradients[name] - expected).norm()) < tolerance * float(expected.norm()), name
