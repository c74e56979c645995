"""The model a client trains: a frozen Transformers encoder, LoRA in it, a head on top.

    logits = head(pool(encoder(tokens))),    encoder = PEFT model on the plain base

The base stays in eval mode, also in training: its own dropout is off, so that what a
client computes depends on its adapter, its data and its named random streams alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from copra_fl import assets, bases
from copra_fl import residual as residuals
from copra_fl.adapter import Adapter, part_of
from copra_fl.bases import open_base
from copra_fl.config import ConfigError, DataConfig, ModelConfig
from copra_fl.gates import Gates
from copra_fl.seeding import torch_stream

#: tokens from which on sdpa trains faster than eager on a CPU in float32; in bfloat16 it does not up to 512
#: (experiments/LOG.md)
SDPA_TOKENS = 128


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str, pooler_output: Tensor | None) -> Tensor:
    """(B, T, D) hidden states to (B, D) features, in float32 at least; `mean` runs over real tokens only."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if pooling == "mean":
        mask = attention_mask.unsqueeze(-1).to(dtype)
        return (hidden.to(dtype) * mask).sum(1) / mask.sum(1)
    if pooling == "cls":
        return hidden[:, 0].to(dtype)
    if pooler_output is None:
        raise ConfigError("pooling = 'pooler' needs a model with a pooler, this one has none; use mean or cls")
    return pooler_output.to(dtype)


class Classifier(nn.Module):
    """Encoder with LoRA, pooling, linear head.

    Attributes:
        gates: switches the adapters, one gate per group.
        group_of: adapter tensor name -> index of its gate group; the head's tensors have none.
        linears: adapted module, as in an adapter tensor's name before ``.lora_`` -> its frozen linear layer.
        beside: adapted module -> what its residual multiplies x by (`residual.matrices`), where it has one.
        device: where it computes.
    """

    def __init__(self, encoder: PeftModel, head: nn.Linear, pooling: str, group: str, device: torch.device) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.pooling = pooling
        self.device = device
        self.gates = Gates(encoder.get_base_model(), group)
        self._trainable = {
            name.replace(".default.", "."): parameter
            for name, parameter in encoder.named_parameters()
            if ".lora_" in name
        }
        self.group_of = {
            name: self.gates.group_of[name.removeprefix("base_model.model.").split(".lora_")[0]]
            for name in self._trainable
        }
        base: Any = encoder.get_base_model()
        self.linears: dict[str, Any] = {
            f"base_model.model.{name}": base.get_submodule(name).get_base_layer() for name in self.gates.group_of
        }
        self.beside: dict[str, tuple[Tensor, ...]] = {}
        self._hooks: list[Any] = []
        self._trainable |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
        self._dropouts = [dropout for module in _lora_layers(encoder) for dropout in module.lora_dropout.values()]
        self.to(device).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) tokens to (B, classes) logits in float32."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        pooler_output = getattr(output, "pooler_output", None)
        return self.head(pool(output.last_hidden_state, attention_mask, self.pooling, pooler_output))

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives (adapters, B, classes) logits for (B, T) tokens and attention mask, every gate open."""

        def predict(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = []
            for adapter in adapters:
                self.write_adapter(adapter)
                logits.append(self(input_ids, attention_mask))
            return torch.stack(logits)

        self.gates.open()
        self.train_adapters(False)
        return predict

    def train_adapters(self, on: bool) -> None:
        """LoRA dropout on or off; the base is in eval mode always."""
        for dropout in self._dropouts:
            dropout.train(on)

    def train_only(self, parts: Collection[str]) -> dict[str, nn.Parameter]:
        """The parameters of the `parts` (`adapter.part_of`), by name; all others get no gradient from now on."""
        for name, parameter in self._trainable.items():
            parameter.requires_grad_(part_of(name) in parts)
        self.gates.frozen = [parameter for name, parameter in self._trainable.items() if part_of(name) not in parts]
        return {name: parameter for name, parameter in self._trainable.items() if part_of(name) in parts}

    def read_adapter(self) -> Adapter:
        """A copy of adapter and head, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trainable.items()}

    @torch.no_grad()
    def write_adapter(self, adapter: Adapter) -> None:
        """Take over `adapter`, which must have every name of `read_adapter`."""
        torch._foreach_copy_(list(self._trainable.values()), [adapter[name] for name in self._trainable])

    def write_residual(self, residual: Adapter) -> None:
        """Let `residual` (`copra_fl.residual`) act beside W0, in its dtype, in place of any other.

        Raises ValueError for a module that has no adapter.
        """
        modules = residuals.modules(residual)
        if unknown := sorted(set(modules) - self.linears.keys()):
            raise ValueError(f"a residual for {unknown[:3]}, but only {sorted(self.linears)[:3]}, ... have adapters")
        for hook in self._hooks:
            hook.remove()
        self.beside.clear()
        for name in modules:
            weight = self.linears[name].weight
            self.beside[name] = tuple(matrix.to(weight) for matrix in residuals.matrices(residual, name))
        self._hooks = [
            self.linears[name].register_forward_hook(partial(_add_product, matrices))
            for name, matrices in self.beside.items()
        ]


def _add_product(matrices: tuple[Tensor, ...], linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + residuals.product(inputs[0], matrices)


def _lora_layers(encoder: nn.Module) -> list[Any]:
    return [module for module in encoder.modules() if isinstance(module, LoraLayer)]


def resolve(model: str) -> str:
    """What Transformers can open: an asset's folder (fetched if missing), else the name or path as it is."""
    return str(assets.fetch(model)) if model in assets.ASSETS else model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an asset, path or hub name. Raises ConfigError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(model, error)) from error


def _not_found(model: str, error: Exception) -> str:
    names = ", ".join(name for name, asset in assets.ASSETS.items() if asset.kind == "model")
    return (
        f"model = {model!r} is not an asset ({names}), not a folder with a Transformers model, and could not be "
        f"had from the Hugging Face hub: {str(error).splitlines()[0]}"
    )


def check_weights(config: ModelConfig) -> str:
    """SHA-256 of the base's weights (`bases.weights_digest`).

    Raises ConfigError where there is no such model, or ``model-sha256`` names other weights.
    """
    try:
        digest = bases.weights_digest(resolve(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    if config.model_sha256 not in ("", digest):
        raise ConfigError(
            f"the base differs: the weights of model = {config.model!r} have SHA-256 {digest} here, not "
            f"{config.model_sha256}"
        )
    return digest


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError for cuda without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_compute(config: ModelConfig, max_length: int) -> ModelConfig:
    """`config` with dtype and attention made plain for texts of up to `max_length` tokens on this machine's device.

    Done once for a run, so that all its processes compute alike. Raises ConfigError as `choose_device` does.
    """
    device = choose_device(config.device)
    dtype, attention = config.dtype, config.attention
    if dtype == "auto":
        dtype = "bfloat16" if is_fast_in_bfloat16(device) else "float32"
    if attention == "auto":
        long = dtype == "float32" and max_length >= SDPA_TOKENS
        attention = "sdpa" if device.type == "cuda" or long else "eager"
    return replace(config, dtype=dtype, attention=attention)


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies matrices in bfloat16 itself, and torch makes use of it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(
        processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )


def check_targets(base: nn.Module, target_modules: str) -> str | list[str]:
    """`target_modules` as PEFT takes it. Raises ConfigError naming a target that matches no linear module."""
    if target_modules == "all-linear":
        return target_modules
    linear = sorted({name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)})
    targets = [target.strip() for target in target_modules.split(",")]
    for target in targets:
        if target not in linear:
            raise ConfigError(f"target-modules: {target!r} matches no linear module of the model; there are {linear}")
    return targets


def check(config: ModelConfig) -> None:
    """Raise ConfigError for what `build` would raise, without reading any weights."""
    choose_device(config.device)
    try:
        description = AutoConfig.from_pretrained(resolve(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    with torch.device("meta"):
        check_targets(AutoModel.from_config(description), config.target_modules)


def build(config: ModelConfig, group: str, num_labels: int, seed: int, core: bool = False) -> Classifier:
    """The model at its common start: base from disk, adapter and head initialised from `seed`'s ``init`` stream.

    With `core` there is a matrix R (r, r), at first 0, between the factors: W0 + s B R A.
    Raises ConfigError for an unknown model, a target that matches nothing, a device that is not there.
    """
    device = choose_device(config.device)
    config = resolve_compute(config, DataConfig.max_length)
    try:
        base = open_base(resolve(config.model), config.dtype, config.attention)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    lora = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=config.rank,
        lora_alpha=config.scaling(config.rank) * config.rank,  # type: ignore[arg-type]  # PEFT takes floats, its annotation says int
        lora_dropout=config.lora_dropout,
        target_modules=check_targets(base, config.target_modules),
        exclude_modules=None if config.pooling == "pooler" else r".*pooler.*",
    )
    with torch_stream(torch.device("cpu"), seed, "init"):
        encoder = get_peft_model(base, lora)
        head = nn.Linear(base.config.hidden_size, num_labels)
        if core:
            _insert_cores(encoder, config.rank)
    return Classifier(encoder, head, config.pooling, group, device)


def _insert_cores(encoder: PeftModel, rank: int) -> None:
    """Give each LoRA layer a ``lora_R`` (r, r) of zeros, through which the output of its A goes."""
    for layer in _lora_layers(encoder):
        core = nn.Linear(rank, rank, bias=False)
        nn.init.zeros_(core.weight)
        layer.lora_R = nn.ModuleDict({"default": core})
        layer.lora_A["default"].register_forward_hook(partial(_apply_core, core))


def _apply_core(core: nn.Linear, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return core(output)


@dataclass(frozen=True)
class Saved:
    """A classifier opened from a folder: `model(**tokenizer(texts, ...))` gives logits over `labels`."""

    model: Classifier
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]


def save(model: Classifier, directory: Path, labels: list[str], residual: Adapter | None = None) -> None:
    """Write adapter (PEFT's own format) and head (``head.safetensors``, ``classifier.json``) to `directory`.

    A core and a `residual` are folded into one plain adapter of a higher rank, so that stock PEFT opens it.
    """
    model.gates.open()
    adapter = model.read_adapter()
    if residual or any(part_of(name) == "R" for name in adapter):
        _save_folded(model, adapter, residual or {}, directory)
    else:
        model.encoder.save_pretrained(str(directory))
    save_file({name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()},
              directory / "head.safetensors")  # fmt: skip
    base = model.encoder.get_base_model()
    description = {
        "labels": labels,
        "pooling": model.pooling,
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": model.encoder.config._attn_implementation,
    }
    (directory / "classifier.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _save_folded(model: Classifier, adapter: Adapter, residual: Adapter, directory: Path) -> None:
    lora: Any = copy.copy(model.encoder.peft_config["default"])
    folded = residuals.fold(adapter, residual, lora.lora_alpha / lora.r)
    lora.r = lora.lora_alpha = next(len(tensor) for name, tensor in folded.items() if part_of(name) == "A")
    lora.inference_mode = True
    lora.save_pretrained(str(directory))
    save_file(folded, directory / "adapter_model.safetensors", {"format": "pt"})


def load(directory: str | Path, device: str = "auto") -> Saved:
    """Open what `save` wrote, on the base that the adapter names."""
    directory = Path(directory)
    description = json.loads((directory / "classifier.json").read_text(encoding="utf-8"))
    base_name = LoraConfig.from_pretrained(str(directory)).base_model_name_or_path
    base = open_base(base_name, description["dtype"], description["attention"])
    encoder = PeftModel.from_pretrained(base, str(directory))
    weights = load_file(directory / "head.safetensors")
    head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    head.load_state_dict(weights)
    model = Classifier(encoder, head, description["pooling"], "layer", choose_device(device))
    return Saved(model, AutoTokenizer.from_pretrained(base_name), description["labels"])
