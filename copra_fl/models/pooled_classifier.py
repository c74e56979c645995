"""A Transformers model with a linear classifier on the pooled hidden states of another Transformers model.

`copra-fl export --merge` writes this file beside the weights of a model that no class of Transformers computes. It
needs torch and Transformers only:

    pipeline("text-classification", FOLDER, trust_remote_code=True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledClassifierConfig(PreTrainedConfig):
    """Configuration of a `PooledClassifier`.

    Attributes:
        base: configuration of the model that gives the hidden states.
        pooling: mean (over all tokens that are no padding), cls (the first token) or pooler (the model's own).
    """

    model_type = "pooled-classifier"

    def __init__(self, base: dict[str, Any] | None = None, pooling: str = "mean", **settings: Any) -> None:
        super().__init__(**settings)
        self.base = base or {}
        self.pooling = pooling


class PooledClassifier(PreTrainedModel):
    """logits = classifier(pool(hidden states)); its inputs are those of the base, texts or images."""

    config_class = PooledClassifierConfig
    base_model_prefix = "base"

    def __init__(self, config: PooledClassifierConfig) -> None:
        super().__init__(config)
        base, num_labels = AutoConfig.for_model(**config.base), int(config.num_labels or 0)
        self.base = AutoModel.from_config(base)
        self.classifier = nn.Linear(base.hidden_size, num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **ignored: Any,
    ) -> SequenceClassifierOutput:
        """Return (B, labels) logits of a batch of texts or images."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        features = self.pool(self.base.base_model(**given), attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(features.to(self.dtype)))

    def pool(self, output: Any, attention_mask: Tensor | None) -> Tensor:
        """Return (B, D) features of the base's `output`, in float32 or wider."""
        if self.config.pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.config.pooling == "cls":
            return hidden[:, 0]
        if attention_mask is None:
            return hidden.mean(1)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
