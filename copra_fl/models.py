"""The model a client trains: a frozen Transformers model, LoRA in it, a head on top.

    logits = head(features(body(inputs))),    body and head as the task wants them (`copra_fl.tasks`)

The base stays in eval mode, also in training: its own dropout is off, so that what a
client computes depends on its adapter, its data and its named random streams alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from copra_fl import assets, bases
from copra_fl import residual as residuals
from copra_fl.adapter import Adapter, part_of
from copra_fl.bases import open_base, open_quantised
from copra_fl.config import ConfigError, DataConfig, ModelConfig
from copra_fl.gates import Gates, group_name
from copra_fl.seeding import torch_stream
from copra_fl.tasks import Inputs, Task, find_task

#: tokens from which on sdpa trains faster than eager on a CPU in float32; in bfloat16 it does not up to 512
#: (experiments/LOG.md)
SDPA_TOKENS = 128


class AdaptedModel(nn.Module):
    """A base with LoRA, and what a task makes of its hidden states.

    Attributes:
        task: what it learns.
        peft: PEFT's model on the plain base.
        head: the linear layer that is trained on the features; None where the base's own output layer is the head.
        gates: switches the adapters, one gate per group.
        group_of: adapter tensor name -> index of its gate group; a head's tensors have none.
        linears: adapted module, as in an adapter tensor's name before ``.lora_`` -> its frozen linear layer.
        recomputes: whether blocks are computed again in the backward pass (`recompute_blocks`).
        beside: adapted module -> what its residual multiplies x by (`residual.matrices`), where it has one.
        device: where it computes.
    """

    def __init__(
        self, task: Task, peft: PeftModel, head: nn.Linear | None, pooling: str, group: str, device: torch.device
    ) -> None:
        super().__init__()
        self.task = task
        self.peft = peft
        self.head = head
        self.pooling = pooling
        self.device = device
        self.base.config.use_cache = False  # keys and values are for generating text
        self.gates = Gates(self.base, group)
        self._trainable = {
            name.replace(".default.", "."): parameter for name, parameter in peft.named_parameters() if ".lora_" in name
        }
        self.group_of = {
            name: self.gates.group_of[name.removeprefix("base_model.model.").split(".lora_")[0]]
            for name in self._trainable
        }
        self.linears: dict[str, Any] = {
            f"base_model.model.{name}": self.base.get_submodule(name).get_base_layer() for name in self.gates.group_of
        }
        self.recomputes = False
        self.beside: dict[str, tuple[Tensor, ...]] = {}
        self._hooks: list[Any] = []
        if head is not None:
            self._trainable |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
        self._dropouts = [dropout for module in _lora_layers(peft) for dropout in module.lora_dropout.values()]
        self.to(device).eval()

    @property
    def base(self) -> Any:
        """The plain base, with PEFT's layers in it."""
        return self.peft.get_base_model()

    def forward(self, **batch: Tensor) -> Tensor:
        """A batch of the task's examples to (targets, outputs) logits, in float32 at least."""
        output = self.base.base_model(**self.task.inputs(batch))
        features = self.task.features(output, batch, self.pooling)
        logits = self.head(features) if self.head is not None else own_head(self.base, features)
        return own_outputs(logits, batch)

    def losses(self, batch: Inputs) -> Tensor:
        """(targets,) the loss of each target of a batch."""
        return self.task.losses(self(**batch), batch)

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Inputs], Tensor]:
        """What gives (adapters, targets, outputs) logits for a batch, every gate open."""

        def predict(batch: Inputs) -> Tensor:
            logits = []
            for adapter in adapters:
                self.write_adapter(adapter)
                logits.append(self(**batch))
            return torch.stack(logits)

        self.gates.open()
        self.train_adapters(False)
        return predict

    def recompute_blocks(self) -> None:
        """From now on each block stores its inputs alone for a backward pass, which computes it again.

        Transformers' own way does so in training mode only, and the base is in eval mode. A block that no adapter needs
        a gradient of stores nothing, as before.
        """
        self.recomputes = True
        for name in dict.fromkeys(group_name(module, "layer") for module in self.gates.group_of):
            if name.split(".")[-1].isdigit():
                block = self.base.get_submodule(name)
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

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
            matrices = residuals.matrices(residual, name)
            self.beside[name] = tuple(matrix.to(self.device, self.base.dtype) for matrix in matrices)
        self._hooks = [
            self.linears[name].register_forward_hook(partial(_add_product, matrices))
            for name, matrices in self.beside.items()
        ]


def _add_product(matrices: tuple[Tensor, ...], linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + residuals.product(inputs[0], matrices)


def own_head(base: Any, features: Tensor) -> Tensor:
    """The logits that the base's own output layer gives, in float32 at least."""
    logits = base.get_output_embeddings()(features)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def own_outputs(logits: Tensor, batch: Inputs) -> Tensor:
    """`logits` with -inf for the labels of other data sets than each example's own, where there are several."""
    return logits.masked_fill(~batch["outputs"], -torch.inf) if "outputs" in batch else logits


def _lora_layers(peft: nn.Module) -> list[Any]:
    return [module for module in peft.modules() if isinstance(module, LoraLayer)]


def resolve(model: str) -> str:
    """What Transformers can open: an asset's folder (fetched if missing), else the name or path as it is."""
    return str(assets.fetch(model)) if model in assets.ASSETS else model


def load_processor(config: ModelConfig) -> Any:
    """What the task encodes examples with: tokenizer or image processor. Raises ConfigError where there is none."""
    task = find_task(config.task)
    try:
        return task.processor_class.from_pretrained(resolve(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error


def _not_found(model: str, error: Exception) -> str:
    names = ", ".join(name for name, asset in assets.ASSETS.items() if asset.kind == "model")
    return (
        f"model = {model!r} is not an asset ({names}), not a folder with a Transformers model, and could not be "
        f"had from the Hugging Face hub: {str(error).splitlines()[0]} To use a model of the hub without a network, run "
        f"`hf download {model} --local-dir FOLDER` where there is one, bring the folder here and set model to its path"
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
    kinds = nn.Linear, Conv1D  # GPT-2's Conv1D is a linear layer too
    linear = sorted({name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, kinds)})
    targets = [target.strip() for target in target_modules.split(",")]
    for target in targets:
        if target not in linear:
            raise ConfigError(f"target-modules: {target!r} matches no linear module of the model; there are {linear}")
    return targets


def check(config: ModelConfig) -> None:
    """Raise ConfigError for what `build` would raise, without reading any weights."""
    choose_device(config.device)
    check_quantization(config.quantization)
    try:
        description = AutoConfig.from_pretrained(resolve(config.model))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    with torch.device("meta"):
        check_targets(find_task(config.task).model_class.from_config(description), config.target_modules)


def lora_config(config: ModelConfig, base: nn.Module) -> LoraConfig:
    """PEFT's configuration of the adapters. Raises ConfigError as `check_targets` does."""
    return LoraConfig(
        task_type=find_task(config.task).peft_type,
        r=config.rank,
        lora_alpha=config.scaling(config.rank) * config.rank,  # type: ignore[arg-type]  # PEFT takes floats, its annotation says int
        lora_dropout=config.lora_dropout,
        target_modules=check_targets(base, config.target_modules),
        exclude_modules=r".*pooler.*" if hasattr(base, "pooler") and config.pooling != "pooler" else None,
    )


def build(config: ModelConfig, group: str, num_labels: int, seed: int, core: bool = False) -> AdaptedModel:
    """The model at its common start: base from disk, adapter and head initialised from `seed`'s ``init`` stream.

    `num_labels` is how many labels the task's data has. With `core` there is a matrix R (r, r), at first 0, between the
    factors: W0 + s B R A.
    Raises ConfigError for an unknown model, a target that matches nothing, a device that is not there.
    """
    task, device = find_task(config.task), choose_device(config.device)
    config = resolve_compute(config, DataConfig.max_length)
    try:
        base = _open(resolve(config.model), config.dtype, config.attention, config.quantization, task, device)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(config.model, error)) from error
    lora = lora_config(config, base)
    with torch_stream(torch.device("cpu"), seed, "init"):
        peft = get_peft_model(base, lora)
        head = task.head(base.config.hidden_size, num_labels) if task.trains_head else None
        if core:
            _insert_cores(peft, config.rank)
    model = AdaptedModel(task, peft, head, config.pooling, group, device)
    if config.gradient_checkpointing:
        model.recompute_blocks()
    return model


def _open(source: str, dtype: str, attention: str, quantization: str, task: Task, device: torch.device) -> Any:
    """The base in full or in 4 bits. Raises ConfigError where bitsandbytes is missing."""
    if quantization == "none":
        return open_base(source, dtype, attention, task.model_class)
    check_quantization(quantization)
    return open_quantised(source, dtype, attention, task.model_class, device)


def check_quantization(quantization: str) -> None:
    """Raise ConfigError where what quantises is not installed."""
    missing = [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]
    if quantization != "none" and missing:
        raise ConfigError(
            f"quantization = {quantization!r} needs {' and '.join(missing)}: pip install 'copra-fl[quantization]'"
        )


def _insert_cores(peft: PeftModel, rank: int) -> None:
    """Give each LoRA layer a ``lora_R`` (r, r) of zeros, through which the output of its A goes."""
    for layer in _lora_layers(peft):
        core = nn.Linear(rank, rank, bias=False)
        nn.init.zeros_(core.weight)
        layer.lora_R = nn.ModuleDict({"default": core})
        layer.lora_A["default"].register_forward_hook(partial(_apply_core, core))


def _apply_core(core: nn.Linear, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return core(output)


@dataclass(frozen=True)
class Saved:
    """A model opened from a folder: `model(**processor(...))` gives logits, one for each of `labels` where there are.

    `processor` is the tokenizer or image processor of the base.
    """

    model: AdaptedModel
    processor: Any
    labels: list[str]


def save(model: AdaptedModel, directory: Path, labels: list[str], residual: Adapter | None = None) -> None:
    """Write adapter (PEFT's own format), what else the task needs (``task.json``) and head to `directory`.

    The head, where one is trained, is in ``head.safetensors``. A core and a `residual` are folded into one plain
    adapter of a higher rank, so that stock PEFT opens it.
    """
    model.gates.open()
    adapter = model.read_adapter()
    if residual or any(part_of(name) == "R" for name in adapter):
        _save_folded(model, adapter, residual or {}, directory)
    else:
        model.peft.save_pretrained(str(directory))
    if model.head is not None:
        head = {name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}
        save_file(head, directory / "head.safetensors")
    description = {
        "task": model.task.name,
        "labels": labels,
        "pooling": model.pooling,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "attention": model.base.config._attn_implementation,
        "quantization": "4bit" if getattr(model.base, "is_loaded_in_4bit", False) else "none",
    }
    (directory / "task.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _save_folded(model: AdaptedModel, adapter: Adapter, residual: Adapter, directory: Path) -> None:
    lora: Any = copy.copy(model.peft.peft_config["default"])
    folded = residuals.fold(adapter, residual, lora.lora_alpha / lora.r)
    lora.r = lora.lora_alpha = next(len(tensor) for name, tensor in folded.items() if part_of(name) == "A")
    lora.inference_mode = True
    lora.save_pretrained(str(directory))
    save_file(folded, directory / "adapter_model.safetensors", {"format": "pt"})


def load(directory: str | Path, device: str = "auto") -> Saved:
    """Open what `save` wrote, on the base that the adapter names. Raises ConfigError for a task that is not here."""
    directory = Path(directory)
    description = json.loads((directory / "task.json").read_text(encoding="utf-8"))
    task = find_task(description["task"])
    base_name = LoraConfig.from_pretrained(str(directory)).base_model_name_or_path
    compute = description["dtype"], description["attention"], description.get("quantization", "none")
    base = _open(base_name, *compute, task, choose_device(device))
    peft, head = PeftModel.from_pretrained(base, str(directory)), None
    if task.trains_head:
        weights = load_file(directory / "head.safetensors")
        head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
        head.load_state_dict(weights)
    model = AdaptedModel(task, peft, head, description["pooling"], "layer", choose_device(device))
    return Saved(model, task.processor_class.from_pretrained(base_name), description["labels"])
