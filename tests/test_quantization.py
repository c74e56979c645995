"""Bases in 4 bits: bitsandbytes' own numbers under adapters, trained, saved and opened; refused where it cannot be."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import pipeline

from copra_fl.config import Config, ConfigError
from copra_fl.models import adapted, memory_plan
from copra_fl.models.build import build_model, check_model
from copra_fl.models.export import load
from copra_fl.models.merged import export_merged
from tests.support.compatibility import check
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings
from tests.support.worlds import BATCH, jitter


@pytest.fixture(params=[False, True], ids=["without AVX512-BF16", "with AVX512-BF16"])
def avx512_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Set what bitsandbytes detects about the CPU when it makes a layer. Its packing for such CPUs is plain PyTorch."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def quantised(tiny: Settings, avx512_bf16: bool) -> Settings:
    return tiny | {"quantization": "4bit", "local-training": "lora", "attention": "eager"}


def build(flat: Settings) -> adapted.AdaptedModel:
    config = Config.from_flat(flat)
    return build_model(config.model, config.copra.gate_group, 3, seed=0)


def test_the_model_is_the_one_with_the_dequantised_weights(tiny: Settings, quantised: Settings) -> None:
    """Oracle: the full model, into which bitsandbytes' own dequantised weights are written."""
    in_4_bits, full = build(quantised), build(tiny)
    adapter = jitter(full.read_adapter(), 1)
    modules = dict(in_4_bits.base.named_modules())
    changed = 0
    for name, module in full.base.named_modules():
        if isinstance(modules[name], Linear4bit):
            quantised_weight = modules[name].weight
            module.weight.data = dequantize_4bit(quantised_weight.data, quantised_weight.quant_state)
            changed += 1
    assert changed >= 3 * 6  # layers x (query, key, value, output, both of the MLP)
    with torch.inference_mode():
        for model in (in_4_bits, full):
            model.write_adapter(adapter)
        torch.testing.assert_close(in_4_bits(**BATCH), full(**BATCH), rtol=1e-4, atol=1e-5)


def test_an_evaluation_changes_neither_numbers_nor_gradients(quantised: Settings) -> None:
    """Between rounds a node evaluates and trains with one model; bitsandbytes must not repack its weights."""
    model = build(quantised)
    model.write_adapter(jitter(model.read_adapter(), 1))

    def logits_and_gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)  # of the dropout
        model.base.train()
        logits = model(**BATCH)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(logits.square().sum(), trained)
        return [logits.detach(), *gradients]

    before = logits_and_gradients()
    model.base.eval()
    with torch.inference_mode():
        model(**BATCH)
    for value, expected in zip(logits_and_gradients(), before, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert before[1].abs().sum() > 0


def test_bitsandbytes_prints_nothing_without_quantization() -> None:
    code = "import copra_fl.models, logging; print(logging.getLogger('bitsandbytes.backends.cpu.ops').level)"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == (str(logging.ERROR), "")


def test_a_residual_is_added_in_the_dtype_of_the_base(quantised: Settings) -> None:
    model = build(quantised)
    name = sorted(model.linears)[0]
    inputs = torch.randn(4, model.linears[name].in_features)
    before = model.linears[name](inputs)
    torch.manual_seed(0)
    left, right = torch.randn(model.linears[name].out_features, 2), torch.randn(2, model.linears[name].in_features)
    model.write_residual({f"{name}.residual_B": left, f"{name}.residual_A": right})
    torch.testing.assert_close(model.linears[name](inputs) - before, inputs @ (left @ right).T, rtol=1e-4, atol=1e-3)


def test_a_federation_ends_in_an_adapter_for_the_same_base(quantised: Settings, tmp_path: Path) -> None:
    folder = run_federation(quantised, tmp_path / "run")
    note = json.loads((folder / "provenance.json").read_text())["start"]["engine"]
    assert "engine = 'stacked' cannot take this model" in note and "Linear4bit" in note
    saved = load(folder / "adapter", "cpu")
    assert any(isinstance(module, Linear4bit) for module in saved.model.base.modules())
    merged = export_merged(folder / "adapter", tmp_path / "merged", "float32")
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    opened = pipeline("text-classification", str(tmp_path / "merged"), trust_remote_code=True)
    with torch.inference_mode():
        torch.testing.assert_close(opened.model(**BATCH).logits, saved.model(**BATCH), rtol=1e-3, atol=1e-4)


def test_the_plan_counts_4_bits(quantised: Settings) -> None:
    """Oracle: what the quantised model itself holds."""
    needed = memory_plan.plan(Config.from_flat(quantised), 3, 16)
    base = build(quantised).base
    held = sum(parameter.nbytes for name, parameter in base.named_parameters() if ".lora_" not in name)
    assert needed.base == pytest.approx(held, rel=0.02)
    assert needed.base < 0.5 * memory_plan.plan(Config.from_flat(quantised | {"quantization": "none"}), 3, 16).base


def test_what_cannot_be_is_refused(quantised: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'fed-sb' does not combine with quantization = '4bit'"):
        check(Config.from_flat(quantised | {"rule": "fed-sb"}))
    monkeypatch.setattr("copra_fl.models.build.find_spec", lambda name: None if name == "bitsandbytes" else True)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install '.+\[quantization\]'"):
        check_model(Config.from_flat(quantised).model)
    check_model(Config.from_flat(quantised | {"quantization": "none"}).model)
