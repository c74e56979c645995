"""A residual acts as if it were added to W0, and is exported with the adapter for PEFT alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from copra_fl.adapters import residual
from copra_fl.adapters.state import Adapter
from copra_fl.config import Config, DataConfig
from copra_fl.models.build import build_model
from copra_fl.models.export import load, save
from copra_fl.tasks.classification import pool
from tests.support.tiny import Settings
from tests.support.worlds import BATCH, World, assert_alike, jitter, random_residual


def add_to_weights(world: World, change: Adapter) -> None:
    """Add `change` to the base's weights."""
    for name in residual.modules(change):
        linear = world.plain.linears[name]
        linear.weight = nn.Parameter(linear.weight + residual.of(change, name).to(linear.weight), requires_grad=False)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factors"])
@pytest.mark.parametrize("target", ["query,value", "all-linear"])
def test_a_residual_acts_as_if_added_to_the_base(tiny: Settings, dense: bool, target: str) -> None:
    """Oracle: the same model with changed base weights, in predictions with gates open and closed, and in training."""
    flat = tiny | {"local-steps": 10, "num-rounds": 4, "target-modules": target}
    beside, inside = World(flat, double=True), World(flat, double=True)
    change = random_residual(beside.plain, dense)
    beside.plain.write_residual(change)
    add_to_weights(inside, change)
    with torch.inference_mode():
        for mask in ([True] * 3, [False, True, False], [False] * 3):
            for world in (beside, inside):
                world.plain.write_adapter(world.start)
                world.plain.gates.set(mask)
            assert torch.allclose(beside.plain(**BATCH), inside.plain(**BATCH), atol=1e-12)
        adapters = [beside.start, jitter(beside.start, 1, 0.2)]
        expected = inside.plain.predictor(adapters)(BATCH)
        for model in (beside.stacked, beside.plain):
            assert torch.allclose(model.predictor(adapters)(BATCH), expected, atol=1e-12)
    for update in (*beside.together(0, 1, 2), beside.alone(0)):
        assert_alike(update, inside.alone(update.client), 1e-10)


def test_removing_a_residual_restores_the_logits_bitwise(tiny: Settings) -> None:
    model = build_model(Config.from_flat(tiny).model, "layer", 3, seed=0)
    with torch.inference_mode():
        before = model(**BATCH)
        model.write_residual(random_residual(model, True))
        model.write_residual(random_residual(model, False))
        assert not torch.allclose(model(**BATCH), before)
        model.write_residual({})
        assert torch.equal(model(**BATCH), before)
    assert not any(linear._forward_hooks for linear in model.linears.values())


def test_a_residual_acts_in_the_dtype_of_the_base(tiny: Settings) -> None:
    world = World(tiny | {"dtype": "bfloat16", "local-steps": 10})
    world.plain.write_residual(random_residual(world.plain, True))
    factors_by_module = world.plain.residual_factors.values()
    assert {matrix.dtype for matrices in factors_by_module for matrix in matrices} == {torch.bfloat16}
    for update in world.together(0, 1):
        assert_alike(update, world.alone(update.client), 0.02)


def test_a_residual_for_a_module_without_an_adapter_is_refused(tiny: Settings) -> None:
    model = build_model(Config.from_flat(tiny).model, "layer", 3, seed=0)
    with pytest.raises(ValueError, match=r"encoder.layer.0.output.dense.*but only.*query"):
        model.write_residual({"base_model.model.encoder.layer.0.output.dense.residual": torch.zeros(32, 64)})


def factors(d: int, k: int, rank: int, seed: int) -> Adapter:
    stream = torch.Generator().manual_seed(seed)
    return {
        "m.residual_B": torch.randn(d, rank, generator=stream),
        "m.residual_A": torch.randn(rank, k, generator=stream),
    }


def test_adding_keeps_the_sum_and_turns_dense_where_factors_are_no_smaller() -> None:
    """d = 12, k = 20: factors of rank n have 32 n values, the matrix 240."""
    total, expected = factors(12, 20, 3, 0), residual.of(factors(12, 20, 3, 0), "m")
    for seed, names in enumerate([["m.residual_A", "m.residual_B"], ["m.residual"], ["m.residual"]], start=1):
        increment = factors(12, 20, 3, seed)
        total, expected = residual.add(total, increment), expected + residual.of(increment, "m")
        assert list(total) == names
        assert torch.allclose(residual.of(total, "m"), expected, atol=1e-5)
    assert residual.add({}, total) == total == residual.add(total, {})
    x = torch.randn(5, 20)
    for change in (total, factors(12, 20, 3, 9)):
        expected_product = x @ residual.of(change, "m").float().T
        assert torch.allclose(residual.product(x, residual.matrices(change, "m")), expected_product, atol=1e-4)


CHANGES = {"dense": True, "factors": False, "none": None}


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("dense", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_saved_model_gives_the_same_logits_in_peft_alone(
    tiny: Settings, tmp_path: Path, heads: int, dense: bool | None, scaling: str
) -> None:
    """The linear modules have d = k, d > k and d < k."""
    config = Config.from_flat(tiny | {"target-modules": "all-linear", "lora-scaling": scaling}).model
    model = build_model(config, "layer", 3, seed=0, heads=heads)
    model.write_adapter(jitter(model.read_adapter(), 3, 0.2))
    change = {} if dense is None else random_residual(model, dense)
    model.write_residual(change)
    save(model, tmp_path, ["a", "b", "c"], DataConfig(), change)
    base = AutoModel.from_pretrained(str(tiny["model"]), attn_implementation="eager")
    stock = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    head = load_file(tmp_path / "head.safetensors")
    lora = stock.peft_config["default"]
    assert lora.r == {True: 34, False: 5, None: 2}[dense]
    assert lora.lora_alpha == lora.r * (config.scaling(2) if dense is None and not heads else 1)
    with torch.inference_mode():
        expected = model(**BATCH)
        for encoder in (stock, stock.merge_and_unload()):
            hidden = encoder(**BATCH).last_hidden_state
            logits = nn.functional.linear(pool(hidden, BATCH["attention_mask"], "mean", None), **head)
            assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.allclose(load(tmp_path, device="cpu").model(**BATCH), expected, atol=1e-5)
    folded = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in folded.values()} == {torch.float32}
