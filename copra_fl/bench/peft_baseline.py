"""Local training with PEFT as its users write it: AdamW, one batch per step, base in the configuration's dtype.

The baselines use it in process and over Flower. It shares with our engine only what must be equal for equal results:
the data, and the batches and masks (`training.batches.plan_steps`). CopRA switches each layer's adapters on or off
before a step.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from copra_fl.config import ModelConfig, TrainingConfig
from copra_fl.data.federated import FederatedData
from copra_fl.models.build import choose_device, model_source
from copra_fl.training.batches import LocalSteps


class Classifier(nn.Module):
    """A PEFT model on a frozen encoder, mean pooling, a linear head.

    Attributes:
        trainable: the trained parameters, by PEFT's names.
        layers: the LoRA modules of each transformer block.
    """

    def __init__(self, config: ModelConfig, num_labels: int) -> None:
        super().__init__()
        dtype = getattr(torch, config.dtype)
        base = AutoModel.from_pretrained(model_source(config.model), dtype=dtype, attn_implementation=config.attention)
        lora = LoraConfig(
            task_type="FEATURE_EXTRACTION",
            r=config.rank,
            lora_alpha=int(config.lora_alpha),
            target_modules=config.target_modules.split(","),
        )
        self.encoder = get_peft_model(base, lora)
        self.head = nn.Linear(base.config.hidden_size, num_labels)
        self.device = choose_device(config.device)
        self.to(self.device).eval()
        adapter = {n.replace(".default.", "."): p for n, p in self.encoder.named_parameters() if ".lora_" in n}
        self.trainable = adapter | {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        blocks: Any = base.encoder.layer
        self.layers = [[module for module in block.modules() if isinstance(module, LoraLayer)] for block in blocks]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map (B, T) tokens to (B, classes) logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    @torch.no_grad()
    def write(self, adapter: dict[str, Tensor]) -> None:
        """Load an adapter. PEFT's set_peft_model_state_dict does the same, but takes many times as long."""
        for name, parameter in self.trainable.items():
            parameter.copy_(adapter[name])

    def read(self) -> dict[str, Tensor]:
        """Return a copy of the adapter on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trainable.items()}

    def switch(self, mask: list[bool]) -> None:
        """Switch the adapters of each layer on or off; `mask` is True for layers that are on."""
        for modules, is_on in zip(self.layers, mask, strict=True):
            for module in modules:
                if module.disable_adapters == is_on:
                    module.enable_adapters(is_on)


def train(model: Classifier, data: FederatedData, steps: LocalSteps, training: TrainingConfig) -> float:
    """Train `model` on one client's batches; return the mean loss."""
    parameters = list(model.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    losses = []
    for (indices,), mask in zip(steps.batches, steps.masks.tolist(), strict=True):
        model.switch(mask)
        batch = data.examples.batch(indices, model.device)
        loss = F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)
