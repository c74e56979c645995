"""Build the model of a configuration: base, adapters and head; or raise a ConfigError with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from copra_fl.adapters.core import block_diagonal
from copra_fl.aggregation.compatibility import with_explicit_parameters
from copra_fl.config import Config, ConfigError, DataConfig, ModelConfig
from copra_fl.models import base_weights
from copra_fl.models.adapted import AdaptedModel, lora_layers
from copra_fl.models.base_weights import open_base, open_quantized
from copra_fl.provenance import pip_install
from copra_fl.seeding import torch_stream
from copra_fl.sources import assets
from copra_fl.tasks import Task, find_task

#: number of tokens from which sdpa trains faster than eager on a CPU in float32; in bfloat16 eager is faster up to 512
#: (experiments/LOG.md)
SDPA_TOKENS = 128


def model_source(model: str) -> str:
    """Return the path or name that Transformers opens: an asset's folder (fetched if missing), else `model` itself."""
    return str(assets.fetch(model)) if assets.is_asset(model) else model


def load_processor(config: ModelConfig) -> Any:
    """Load the tokenizer or image processor of the model. Raises ConfigError if the model has no processor."""
    task = find_task(config.task)
    try:
        return task.processor_class.from_pretrained(model_source(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error


def _not_found(model: str, error: Exception) -> str:
    names = ", ".join(name for name, asset in assets.ASSETS.items() if asset.kind == "model")
    return (
        f"model = {model!r} is not an asset ({names}), not a folder with a Transformers model, and could not be loaded "
        f"from the Hugging Face hub: {str(error).splitlines()[0]} To use a model of the hub without a network, run "
        f"`hf download {model} --local-dir FOLDER` on a machine with a network, copy the folder here and set model to "
        "its path"
    )


def check_weights(config: ModelConfig) -> str:
    """Return the SHA-256 of the base's weights (`base_weights.weights_digest`).

    Raises ConfigError for an unknown model, or if ``model-sha256`` is the digest of other weights.
    """
    try:
        digest = base_weights.weights_digest(model_source(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    if config.model_sha256 not in ("", digest):
        raise ConfigError(
            f"the base differs: the weights of model = {config.model!r} have SHA-256 {digest} here, not "
            f"{config.model_sha256}"
        )
    return digest


def choose_device(device: str) -> torch.device:
    """Return the device; `auto` is CUDA if available. Raises ConfigError for cuda without a CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_config(config: Config) -> Config:
    """Return `config` with dtype, attention, the number of clients in the scaling and the rule's parameters explicit.

    Done once per run, so that all its processes compute alike. Raises ConfigError as `choose_device`, `scaling_clients`
    and `aggregation.compatibility.parameters_of` do.
    """
    model = replace(resolve_compute(config.model, config.data.max_length), scaling_clients=scaling_clients(config))
    return with_explicit_parameters(replace(config, model=model))


def scaling_clients(config: Config) -> int:
    """Return N of the scaling alpha sqrt(N / r); 0 with other scalings. Raises ConfigError if N is not known."""
    if config.model.lora_scaling != "sfed":
        return 0
    number = config.model.scaling_clients or config.federation.round_size(config.data.num_clients)
    if number == 0:
        raise ConfigError(
            "lora-scaling = 'sfed' needs the number of clients per round, and num-clients = 0 leaves it to the nodes; "
            "set scaling-clients"
        )
    return number


def resolve_compute(config: ModelConfig, max_length: int) -> ModelConfig:
    """Return `config` with ``auto`` replaced in dtype and attention, for texts of up to `max_length` tokens.

    The choice depends on this machine's device. It is made once per run, so that all processes compute alike. Raises
    ConfigError as `choose_device` does.
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
    """Return whether `device` has instructions for bfloat16 matrix products that torch uses."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(
        processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )


def check_targets(base: PreTrainedModel, config: ModelConfig) -> str | list[str]:
    """Return ``target-modules`` in PEFT's form: names of modules, or the ends of their dotted paths.

    Raises ConfigError for a target that matches no linear module, or one that the task cannot adapt.
    """
    if config.target_modules == "all-linear":
        return config.target_modules
    kinds = nn.Linear, Conv1D  # GPT-2's Conv1D is a linear layer too
    linear = {name: module for name, module in base.named_modules() if isinstance(module, kinds)}
    frozen = None if find_task(config.task).adapts_output_layer else base.get_output_embeddings()
    targets = [target.strip() for target in config.target_modules.split(",")]
    for target in targets:
        matches = [module for name, module in linear.items() if f".{name}".endswith(f".{target}")]
        if not matches:
            last_names = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"target-modules: {target!r} matches no linear module of the model; its linear modules are "
                f"{', '.join(last_names)}, and {next(iter(linear))} names one of them alone"
            )
        if any(module is frozen for module in matches):
            raise ConfigError(
                f"target-modules: {target!r} is the output layer, which task = {config.task!r} uses frozen; "
                "leave it out"
            )
    return targets


def check_model(config: ModelConfig) -> None:
    """Raise the ConfigError that `build_model` would raise, without reading any weights."""
    choose_device(config.device)
    check_quantization(config.quantization)
    try:
        description = AutoConfig.from_pretrained(model_source(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    with torch.device("meta"):
        check_targets(find_task(config.task).model_class.from_config(description), config)


def check_max_length(config: ModelConfig, max_length: int) -> None:
    """Raise ConfigError for texts of up to `max_length` tokens if the model has fewer positions."""
    if "text-column" not in find_task(config.task).columns:
        return
    description = AutoConfig.from_pretrained(model_source(config.model))
    positions = getattr(description.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    # Some of RoBERTa's positions are not for tokens; its tokenizer knows how many are.
    limit = min(positions, load_processor(config).model_max_length)
    if max_length > limit:
        raise ConfigError(
            f"max-length = {max_length} is more than the {limit} tokens that model = {config.model!r} takes"
        )


def lora_config(config: ModelConfig, base: PreTrainedModel) -> LoraConfig:
    """Return PEFT's configuration of the adapters. Raises ConfigError as `check_targets` does."""
    return LoraConfig(
        task_type=find_task(config.task).peft_type,
        r=config.rank,
        lora_alpha=config.scaling(config.rank) * config.rank,  # type: ignore[arg-type]  # PEFT takes floats, its annotation says int
        lora_dropout=config.lora_dropout,
        use_dora=config.dora,
        target_modules=check_targets(base, config),
        exclude_modules=r".*pooler.*" if hasattr(base, "pooler") and config.pooling != "pooler" else None,
    )


def build_model(config: ModelConfig, group: str, num_labels: int, seed: int, heads: int = 0) -> AdaptedModel:
    """Build the initial model of a run: base from disk, adapter and head drawn from the ``init`` stream of `seed`.

    Args:
        config: model, adapters, device.
        group: unit of a gate, "layer" or "module".
        num_labels: number of labels of the task's data.
        seed: seed of the run.
        heads: number of blocks of a matrix R between the factors, W0 + s B R A (`adapters.core`); 0: no such matrix.

    Raises ConfigError for an unknown model, a target that matches no module, or a missing device.
    """
    task, device = find_task(config.task), choose_device(config.device)
    config = resolve_compute(config, DataConfig.max_length)
    try:
        base = open_model(model_source(config.model), config.dtype, config.attention, config.quantization, task, device)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    lora = lora_config(config, base)
    with torch_stream(torch.device("cpu"), seed, "init"):
        peft = get_peft_model(base, lora)
        head = task.head(base.config.hidden_size, num_labels) if task.trains_head else None
    if config.lora_dropout:
        for layer in lora_layers(peft):
            layer.lora_dropout["default"] = Dropout(config.lora_dropout)
    if heads:
        _insert_cores(peft, config.rank, heads)
    model = AdaptedModel(task, peft, head, config.pooling, group, device)
    if config.gradient_checkpointing:
        model.recompute_blocks()
    return model


def open_model(
    source: str, dtype: str, attention: str, quantization: str, task: Task, device: torch.device
) -> PreTrainedModel:
    """Open the base unquantized or in 4 bits. Raises ConfigError if bitsandbytes is needed and missing."""
    if quantization == "none":
        return open_base(source, dtype, attention, task.model_class)
    check_quantization(quantization)
    return open_quantized(source, dtype, attention, task.model_class, device)


def check_quantization(quantization: str) -> None:
    """Raise ConfigError if a package that `quantization` needs is not installed."""
    missing = [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]
    if quantization != "none" and missing:
        raise ConfigError(
            f"quantization = {quantization!r} needs {' and '.join(missing)}: {pip_install('quantization')}"
        )


class Dropout(nn.Dropout):
    """Dropout that draws from a generator alike on all devices, and as the stacked engine does.

    On a CPU it is torch's own, bit for bit. On CUDA torch draws in a fused kernel, which gives other masks.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = 1 - self.p
        return x * torch.empty_like(x).bernoulli_(kept).div_(kept)


class _Weight(nn.Module):
    """A tensor as a module, so that its parameter has a name like those of A and B."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def _insert_cores(peft: PeftModel, rank: int, heads: int) -> None:
    """Give each LoRA layer the blocks ``lora_R`` (r, r / heads) of a matrix that is applied to the output of its A.

    They are 0. With several heads, the layer also gets their scales ``lora_S`` (heads, 1), which are 1.
    """
    for layer in lora_layers(peft):
        tensors = [_Weight(torch.zeros(rank, rank // heads))]
        layer.lora_R = nn.ModuleDict({"default": tensors[0]})
        if heads > 1:
            tensors.append(_Weight(torch.ones(heads, 1)))
            layer.lora_S = nn.ModuleDict({"default": tensors[1]})
        layer.lora_A["default"].register_forward_hook(partial(_apply_core, tensors))


def _apply_core(tensors: Sequence[_Weight], linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return F.linear(output, block_diagonal(*(tensor.weight for tensor in tensors)))
