"""One label an example, by a linear head on what is pooled of the base: logits = head(pool(hidden states))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.config import ConfigError
from copra_fl.tasks.task import Inputs, Task


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str, pooler_output: Tensor | None) -> Tensor:
    """(B, T, D) hidden states to (B, D) features, in float32 at least; `mean` runs over real tokens only.

    Without a mask all tokens are real. Raises ConfigError for a pooler that is not there.
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
        raise ConfigError("pooling = 'pooler' needs a model with a pooler, this one has none; use mean or cls")
    return pooler_output.to(dtype)


class Classification(Task):
    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        pooler_output = getattr(output, "pooler_output", None)
        return pool(output.last_hidden_state, batch.get("attention_mask"), pooling, pooler_output)

    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        return logits.argmax(1) == batch["labels"]
