"""Classification with one label per example: logits = head(pool(hidden states)), with a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.config import ConfigError
from copra_fl.tasks.task import Inputs, Task


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str, pooler_output: Tensor | None) -> Tensor:
    """Pool (B, T, D) hidden states to (B, D) features, in float32 or wider.

    `mean` averages over the tokens of `attention_mask`, or over all tokens without a mask. Raises ConfigError for
    `pooler` if the model has no pooler.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if pooling == "mean":
        if attention_mask is None:
            return hidden.to(dtype).mean(1)
        mask = attention_mask.unsqueeze(-1).to(dtype)
        return (hidden.to(dtype) * mask).sum(1) / mask.sum(1)
    if pooling == "cls":
        return hidden[:, 0].to(dtype)
    if pooler_output is None:
        raise ConfigError("pooling = 'pooler', but the model has no pooler; use mean or cls")
    return pooler_output.to(dtype)


class Classification(Task):
    """Classification of examples with one label, by cross-entropy. Subclasses define the content."""

    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        pooler_output = getattr(output, "pooler_output", None)
        return pool(output.last_hidden_state, batch.get("attention_mask"), pooling, pooler_output)

    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    def predictions(self, logits: Tensor, batch: Inputs) -> Tensor | None:
        return logits.argmax(1) if self.labels == "one" else None

    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        return logits.argmax(1) == batch["labels"]
