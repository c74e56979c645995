"""What a worker's memory goes to while it trains, known before anything is loaded.

    base + c x (adapter, gradients, moments) + c x batch-size x (activations of a row) + prefix cache

c is how many clients one step trains together (``step-tokens``). A row's activations are what autograd keeps of it for
the backward pass with every adapter on, which is the most that CopRA comes to. They are counted, not estimated by a
formula of layers and widths: the encoder runs on torch's meta device, which computes shapes and no numbers.
Left out are passing tensors of a block, and what CUDA and Python take themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig

from copra_fl.config import Config, ConfigError, ModelConfig, TrainingConfig
from copra_fl.models.build import lora_config, model_source
from copra_fl.tasks import find_task
from copra_fl.tasks.images import blank_images

GB = 1e9

#: of a weight in NF4 with double quantisation (QLoRA, section 3)
NF4_BITS = 4.127


@dataclass(frozen=True)
class MemoryPlan:
    """
    Attributes:
        base: bytes of the frozen base; on a CPU all workers share them.
        client: bytes that each client of a step adds by itself: adapter, gradients, moments of the optimiser.
        row: bytes that autograd keeps of the longest example.
        prefix: bytes of the prefix cache.
        clients: how many a step trains together, at most.
        batch_size: rows of each.
        tokens: of the longest row.
    """

    base: int
    client: int
    row: int
    prefix: int
    clients: int
    batch_size: int
    tokens: int

    @property
    def total(self) -> int:
        return self.base + self.prefix + self.clients * self._of_a_client

    @property
    def _of_a_client(self) -> int:
        return self.client + self.batch_size * self.row

    def clients_within(self, limit: float) -> int:
        """How many clients can step together in `limit` bytes."""
        return max(0, int((limit - self.base - self.prefix) // self._of_a_client))

    def __str__(self) -> str:
        prefix = f" + prefix cache {_words(self.prefix)}" if self.prefix else ""
        return (
            f"{_words(self.total)} = base {_words(self.base)}{prefix} + {self.clients} clients x "
            f"(adapter and optimiser {_words(self.client)} + {self.batch_size} rows x activations {_words(self.row)})"
        )


@dataclass(frozen=True)
class Encoder:
    """What an encoder with adapters takes.

    Attributes:
        base: bytes of its frozen weights.
        adapter: numbers in one adapter, head not counted.
        width: of its hidden states.
        row: bytes that autograd keeps of a row.
    """

    base: int
    adapter: int
    width: int
    row: int


def plan(config: Config, num_labels: int, tokens: int) -> MemoryPlan:
    """The memory plan of a run whose dtype, attention and number of clients are plain, of `tokens` an example."""
    training = config.training
    encoder = measure(config.model, tokens)
    head = (encoder.width + 1) * num_labels if find_task(config.model.task).trains_head else 0
    together = -(-training.step_tokens // (training.batch_size * tokens)) if training.engine == "stacked" else 1
    return MemoryPlan(
        base=encoder.base,
        client=(encoder.adapter + head) * torch.float32.itemsize * _copies(training),
        row=encoder.row,
        prefix=int(training.hidden_state_cache_mb * 1e6),
        clients=min(together, config.data.num_clients),
        batch_size=training.batch_size,
        tokens=tokens,
    )


@functools.cache
def measure(config: ModelConfig, num_tokens: int) -> Encoder:
    """The encoder of `config`, made and run on the meta device; rows of `num_tokens` tokens."""
    with torch.device("meta"):
        base: Any = find_task(config.task).model_class.from_config(
            AutoConfig.from_pretrained(model_source(config.model)),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )
        # The engine computes products with adapters in the base's dtype.
        encoder = get_peft_model(base, lora_config(config, base), autocast_adapter_dtype=False).eval()
    one, two = (kept_bytes(encoder, _blank(base, number, num_tokens)) for number in (1, 2))
    trained = {id(parameter): parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad}
    frozen = sum(parameter.nbytes for parameter in encoder.parameters() if id(parameter) not in trained)
    if config.quantization == "4bit":
        frozen -= sum(weight.nbytes - int(weight.numel() * NF4_BITS / 8) for weight in _quantised(base))
    return Encoder(frozen, sum(trained.values()), base.config.hidden_size, two - one)


def _quantised(base: nn.Module) -> Iterator[Tensor]:
    """The weights that bitsandbytes puts into 4 bits: of all linear layers but the output layer."""
    output = base.get_output_embeddings()  # type: ignore[operator]
    for name, module in base.named_modules():
        if type(module) is nn.Linear and ".lora_" not in name and module is not output:
            yield module.weight


def fitted(config: Config, needed: MemoryPlan) -> Config:
    """`config` with no more step-tokens than fit into max-memory. Raises ConfigError where one client does not fit."""
    limit = config.training.max_memory_gb * GB
    if not limit or needed.total <= limit:
        return config
    clients = needed.clients_within(limit)
    if not clients:
        raise ConfigError(
            f"max-memory-gb = {config.training.max_memory_gb:g} (GB) is too little for a single client: "
            f"{replace(needed, clients=1)}; a smaller batch-size, max-length or hidden-state-cache-mb needs less"
        )
    return config.changed(step_tokens=clients * needed.batch_size * needed.tokens)


def _blank(base: Any, number: int, num_tokens: int) -> dict[str, Tensor]:
    if base.main_input_name == "pixel_values":
        return blank_images(base, number)
    return {"input_ids": torch.zeros(number, num_tokens, dtype=torch.long, device="meta")}


def kept_bytes(encoder: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass over `inputs`, parameters not counted."""
    known = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def _copies(training: TrainingConfig) -> int:
    """Values, gradients, and what the optimiser keeps of each."""
    moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return 2 + moments


def _words(number: int) -> str:
    return f"{number / GB:.2f} GB" if number >= GB / 10 else f"{number / 1e6:.2f} MB"
