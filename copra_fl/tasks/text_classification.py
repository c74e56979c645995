"""Text classification with one label per text: logits = head(pool(encoder(tokens)))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.config import DataConfig
from copra_fl.sources.tables import codes
from copra_fl.tasks.classification import Classification
from copra_fl.tasks.texts import Texts, encode_texts, tokenizer_digest

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd


@dataclass(frozen=True)
class LabeledTexts(Texts):
    """Texts with labels.

    Attributes:
        labels: (N, ...) the label of each text; for one label per text its index in the list, (N,) int64.
    """

    labels: Tensor

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(N,) ones: each text is one target."""
        return np.ones(len(self), int)

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the texts `indices`, padded on the right to the longest of them, on `device`.

        The tensors are ``input_ids`` (B, T) int64, ``attention_mask`` (B, T) int64 and ``labels`` (B, ...).
        """
        batch = self.inputs(indices) | {"labels": self.labels[torch.as_tensor(indices)]}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class TextClassification(Classification):
    def processor_digest(self, processor: Any) -> str:
        return tokenizer_digest(processor)

    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        tokens = encode_texts(processor, rows["text-column"], data.max_length)
        return {"labels": codes(rows["label-column"], labels), **tokens}

    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> LabeledTexts:
        tokens = tensors["input_ids"], tensors["offsets"]
        return LabeledTexts(*tokens, int(processor.pad_token_id), data.max_length, tensors["labels"])

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        lengths = torch.cat([part["offsets"].diff() for part in parts])
        rows = [{name: part[name] for name in part if name != "offsets"} for part in parts]
        return super().join(rows) | {"offsets": F.pad(lengths.cumsum(0), (1, 0))}


TASK = TextClassification()
