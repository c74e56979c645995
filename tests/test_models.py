"""dtype and attention are resolved once per run, and a saved model gives the same logits when it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from copra_fl.config import Config, ConfigError, DataConfig, ModelConfig
from copra_fl.models.adapted import lora_layers
from copra_fl.models.build import build_model, resolve_compute, resolve_config
from copra_fl.models.export import load, save
from tests.support.worlds import BATCH

CPU = ModelConfig(device="cpu")
FAST = [{"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": False}, {"bf16": True}]
SLOW = [{"avx2": True, "avx512_bf16": False, "amx_bf16": False}, {"neon": True, "bf16": False}]


@pytest.mark.parametrize("processor", [*FAST, *SLOW])
def test_auto_is_bfloat16_on_processors_with_bfloat16_products(processor: dict[str, bool], monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    dtype = "bfloat16" if processor in FAST else "float32"
    assert resolve_compute(CPU, 64) == ModelConfig(device="cpu", dtype=dtype, attention="eager")


def test_auto_is_float32_without_fast_kernels_in_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: FAST[0])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve_compute(CPU, 64).dtype == "float32"


@pytest.mark.parametrize(
    ("dtype", "max_length", "attention"),
    [("float32", 64, "eager"), ("float32", 256, "sdpa"), ("bfloat16", 64, "eager"), ("bfloat16", 256, "eager")],
)
def test_auto_attention_is_the_fastest_on_a_cpu(dtype: str, max_length: int, attention: str) -> None:
    assert resolve_compute(ModelConfig(device="cpu", dtype=dtype), max_length).attention == attention


def test_explicit_settings_stay() -> None:
    explicit = ModelConfig(device="cpu", dtype="float16", attention="sdpa")
    assert resolve_compute(explicit, 16) == explicit


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"lora-scaling": "rslora"}, 2.0 * 4**-0.5),
        ({"lora-scaling": "sfed", "num-clients": 16}, 2.0 * 4**0.5),
        ({"lora-scaling": "sfed", "num-clients": 16, "fraction-clients": 0.5}, 2.0 * 2**0.5),
        ({"lora-scaling": "sfed", "num-clients": 16, "clients-per-round": 4}, 2.0),
        ({"lora-scaling": "sfed", "num-clients": 0, "scaling-clients": 1}, 2.0 * 4**-0.5),
    ],
)
def test_the_scaling_for_a_number_of_clients(settings: dict, scaling: float) -> None:
    """alpha sqrt(N / r) with alpha = 2 and r = 4."""
    config = resolve_config(Config.from_flat({"device": "cpu", "rank": 4, "lora-alpha": 2.0} | settings))
    assert config.model.scaling(4) == pytest.approx(scaling)
    assert resolve_config(config) == config


def test_the_scaling_for_an_unknown_number_of_clients_is_refused() -> None:
    with pytest.raises(ConfigError, match="set scaling-clients"):
        resolve_config(Config.from_flat({"device": "cpu", "lora-scaling": "sfed", "num-clients": 0}))


@pytest.mark.parametrize(("dtype", "attention"), [("bfloat16", "eager"), ("float32", "sdpa")])
def test_a_saved_model_computes_the_same(tiny: dict, tmp_path: Path, dtype: str, attention: str) -> None:
    config = Config.from_flat(tiny | {"dtype": dtype, "attention": attention}).model
    model = build_model(config, "layer", 3, seed=0)
    with torch.no_grad():
        for parameter in model.train_only({"A", "B"}).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    save(model, tmp_path, ["a", "b", "c"], DataConfig())
    opened = load(tmp_path, device="cpu")
    with torch.inference_mode():
        assert torch.equal(opened.model(**BATCH), model(**BATCH))
    assert opened.model.peft.peft_config["default"].base_model_name_or_path == tiny["model"]


def test_dropout_draws_as_torch_does_on_a_cpu_and_not_with_the_fused_kernel_of_cuda(
    tiny: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `F.dropout`, which takes the fused kernel on CUDA."""
    layers = lora_layers(build_model(Config.from_flat(tiny | {"lora-dropout": 0.3}).model, "layer", 3, seed=0).peft)
    x = torch.linspace(-1, 1, 4 * 33 * 7).view(4, 33, 7).mT
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = F.dropout(x, 0.3)
        monkeypatch.delattr(F, "dropout")
        for layer in layers:
            torch.manual_seed(0)
            assert torch.equal(layer.lora_dropout["default"].train()(x), expected)
            assert layer.lora_dropout["default"].eval()(x) is x
