"""Compute the memory that a worker needs for training before anything is loaded.

    base + c x (adapter, gradients, moments) + c x batch-size x (activations of a row)

c is the number of clients that one step trains together (``step-tokens``). The activations of a row are the tensors
that autograd keeps for the backward pass with every adapter on, the maximum of CopRA. They are counted, not estimated
from layers and widths: the model runs on torch's fake tensors, which have shapes and no numbers, but the kernels of a
CPU. With sdpa these are fused, and keep what those of a GPU keep. Rows are counted as in a batch with padding.
Temporary tensors, as those of a block or the gradient of the logits, and the memory of CUDA and Python are not
included.
With ``gradient-checkpointing`` autograd keeps the inputs of blocks, and all of the one that is being computed again.

With ``client-depths`` the activations are those of the deepest client, and `MemoryPlan.tiers` has each depth's. Layers
that are drawn (``depth-allocation = "random"``) can include the lowest, so every depth is planned with all activations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel

from copra_fl.config import Config, ConfigError, ModelConfig, TrainingConfig
from copra_fl.copra.gates import Gates
from copra_fl.models.adapted import adapted_blocks, recompute
from copra_fl.models.build import lora_config, model_source
from copra_fl.models.kept_bytes import KeptBytes
from copra_fl.tasks import Task, find_task
from copra_fl.tasks.images import blank_images

GB = 1e9

#: bits per weight in NF4 with double quantization (QLoRA, section 3)
NF4_BITS = 4.127


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one worker, in bytes, and the sizes that it follows from.

    Attributes:
        base: bytes of the frozen base; on a CPU all workers share them.
        client: bytes per client of a step: adapter, gradients, moments of the optimizer.
        row: bytes that autograd keeps for the longest example.
        clients: maximum number of clients that a step trains together.
        batch_size: rows per client.
        tokens: tokens of the longest row.
        tiers: depth -> bytes that autograd keeps for the longest example of its clients; empty without client-depths.
    """

    base: int
    client: int
    row: int
    clients: int
    batch_size: int
    tokens: int
    tiers: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.base + self.clients * self._per_client

    @property
    def _per_client(self) -> int:
        return self.client + self.batch_size * self.row

    def clients_within(self, limit: float) -> int:
        """Return the number of clients that can step together within `limit` bytes."""
        return max(0, int((limit - self.base) // self._per_client))

    def __str__(self) -> str:
        return (
            f"{_in_units(self.total)} = base {_in_units(self.base)} + {self.clients} clients x "
            f"(adapter and optimizer {_in_units(self.client)} + "
            f"{self.batch_size} rows x activations {_in_units(self.row)})" + self._tiers
        )

    @property
    def _tiers(self) -> str:
        """The memory of one client of each depth beside the base, as a phrase; empty without client-depths."""
        clients = [
            f"depth {depth} {_in_units(self.client + self.batch_size * row)}" for depth, row in self.tiers.items()
        ]
        return f"; a client of {', of '.join(clients)}" if clients else ""


@dataclass(frozen=True)
class ModelMemory:
    """Memory of a base with adapters.

    Attributes:
        base: bytes of its frozen weights.
        adapter: number of values in one adapter, without the head.
        width: width of its hidden states.
        row: bytes that autograd keeps for a row.
        layer_of: module with an adapter -> its layer, in forward order.
    """

    base: int
    adapter: int
    width: int
    row: int
    layer_of: Mapping[str, str]


def num_groups(config: Config, tokens: int) -> int:
    """Return the number of gate groups of the model of `config`, without reading any weights."""
    layer_of = measure(config.model, tokens).layer_of
    return len(layer_of if config.copra.gate_group == "module" else set(layer_of.values()))


def plan(config: Config, num_labels: int, tokens: int) -> MemoryPlan:
    """Return the memory plan of a run with examples of up to `tokens` tokens.

    dtype, attention and number of clients in `config` must be resolved.
    """
    training, copra, num_clients = config.training, config.copra, config.data.num_clients
    model = measure(config.model, tokens)
    tiers = dict.fromkeys(sorted(set(copra.depth_list)), model.row)
    if copra.depth_allocation == "top":
        tiers = {depth: measure(config.model, tokens, depth, copra.gate_group).row for depth in tiers}
    head = (model.width + 1) * num_labels if find_task(config.model.task).trains_head else 0
    sampled = num_clients if config.privacy.dp_clip else config.federation.sample_size(num_clients)
    together = -(-training.step_tokens // (training.batch_size * tokens)) if training.engine == "stacked" else 1
    return MemoryPlan(
        base=model.base,
        client=(model.adapter + head) * torch.float32.itemsize * _copies(training),
        row=max(tiers.values(), default=model.row),
        clients=min(together, sampled),
        batch_size=training.batch_size,
        tokens=tokens,
        tiers=tiers,
    )


@functools.cache
def measure(config: ModelConfig, num_tokens: int, depth: int = 0, group: str = "layer") -> ModelMemory:
    """Build the model of `config` without numbers, run it on rows of `num_tokens` tokens, and return its memory.

    With a `depth` only the adapters of the last `depth` gate groups are on, and need a gradient.
    """
    task = find_task(config.task)
    with torch.device("meta"):
        base: PreTrainedModel = task.model_class.from_config(
            AutoConfig.from_pretrained(model_source(config.model)),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )
        base.config.use_cache = False
        # The engine multiplies with adapters in the base's dtype.
        adapted = get_peft_model(base, lora_config(config, base), autocast_adapter_dtype=False).eval()
    adapter = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in adapted.parameters() if not parameter.requires_grad)
    if config.quantization == "4bit":
        frozen -= sum(weight.nbytes - int(weight.numel() * NF4_BITS / 8) for weight in _quantized_weights(base))
    gates = Gates(base, group)
    if depth:
        gates.set([index >= len(gates.names) - depth for index in range(len(gates.names))])
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    if config.gradient_checkpointing:  # the last block stands for the one that is computed again
        recompute(
            base, adapted_blocks(gates, (name for name, layer in layers.items() if not layer.disable_adapters))[:-1]
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapted.to_empty(device="cpu")
        one, two = (kept_bytes(adapted, _blank(task, base, number, num_tokens)) for number in (1, 2))
    return ModelMemory(
        frozen, adapter, base.config.hidden_size, two - one, {name: gates.layers.of(name) for name in layers}
    )


def _quantized_weights(base: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the weights that bitsandbytes quantizes: those of all linear layers except the output layer."""
    output = base.get_output_embeddings()
    for name, module in base.named_modules():
        if type(module) is nn.Linear and ".lora_" not in name and module is not output:
            yield module.weight


def limit_step_tokens(config: Config, needed: MemoryPlan) -> Config:
    """Return `config` with step-tokens reduced to fit max-memory-gb. Raises ConfigError if one client does not fit."""
    limit = config.training.max_memory_gb * GB
    if not limit or needed.total <= limit:
        return config
    clients = needed.clients_within(limit)
    if not clients:
        raise ConfigError(
            f"max-memory-gb = {config.training.max_memory_gb:g} (GB) is too little for a single client: "
            f"{replace(needed, clients=1)}; reduce batch-size or max-length{checkpointing_remedy(config)}"
        )
    return config.changed(step_tokens=clients * needed.batch_size * needed.tokens)


def checkpointing_remedy(config: Config) -> str:
    """Return gradient-checkpointing as the last of several remedies; empty if it is on already."""
    return "" if config.model.gradient_checkpointing else ", or set gradient-checkpointing = true"


def _blank(task: Task, base: PreTrainedModel, number: int, num_tokens: int) -> dict[str, Tensor]:
    """Return inputs of `number` examples: black images, or texts of `num_tokens` tokens.

    For a language model every token is a target, so that Transformers' loss is part of the forward pass.
    """
    if base.main_input_name == "pixel_values":
        return blank_images(base, number)
    tokens = torch.zeros(number, num_tokens, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    return inputs if task.trains_head or task.labels != "none" else inputs | {"labels": tokens}


def kept_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the bytes that autograd keeps for a forward pass of `model` over `inputs`, without parameters."""
    kept = KeptBytes(model.parameters())
    with kept.counting():
        model(**inputs)
    return int(kept.peak)


def _copies(training: TrainingConfig) -> int:
    """Return the number of tensors per adapter tensor: values, gradients, moments of the optimizer."""
    moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return 2 + moments


def _in_units(number: int) -> str:
    return f"{number / GB:.2f} GB" if number >= GB / 10 else f"{number / 1e6:.2f} MB"
