"""Texts as tokens: the common base of tasks on texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from copra_fl.config import ConfigError
from copra_fl.files import digest_of

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

#: texts that are tokenized in one call
TEXTS_PER_CALL = 512


@dataclass(frozen=True)
class Texts:
    """Tokenized texts.

    Attributes:
        input_ids: (sum of lengths,) int32, one example after the other.
        offsets: (N + 1,) int64; example i is ``input_ids[offsets[i]:offsets[i + 1]]``.
        pad_id: the padding token of batches.
        max_length: maximum number of tokens; longer texts were truncated.
    """

    input_ids: Tensor
    offsets: Tensor
    pad_id: int
    max_length: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) number of tokens of each example."""
        return self.offsets.diff().numpy()

    def inputs(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` (B, T) int64 of `indices`, padded on the right to the longest."""
        chosen = torch.as_tensor(indices)
        starts, ends = self.offsets[chosen, None], self.offsets[chosen + 1, None]
        positions = starts + torch.arange(int((ends - starts).max()))
        real = positions < ends
        input_ids = torch.full(positions.shape, self.pad_id)
        input_ids[real] = self.input_ids[positions[real]].long()
        return {"input_ids": input_ids, "attention_mask": real.long()}


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: pd.Series, max_length: int) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``offsets`` of `texts`, as in `Texts`, truncated to `max_length` tokens."""
    return join_tokens(tokenize(tokenizer, texts.tolist(), truncation=True, max_length=max_length))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **settings: Any) -> Iterator[list[int]]:
    """Yield the tokens of each of `texts`; `settings` are arguments of the tokenizer's call."""
    for start in range(0, len(texts), TEXTS_PER_CALL):
        part = texts[start : start + TEXTS_PER_CALL]
        yield from tokenizer(part, return_attention_mask=False, return_token_type_ids=False, **settings)["input_ids"]


def join_tokens(examples: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``offsets`` of `examples`, as in `Texts`."""
    parts = [np.zeros(0, np.int32), *(np.asarray(tokens, np.int32) for tokens in examples)]
    return {
        "input_ids": torch.from_numpy(np.concatenate(parts)),
        "offsets": torch.tensor(list(map(len, parts))).cumsum(0),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the `vocabulary_digest`. Raises ConfigError also for a tokenizer without a padding token."""
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} must have a padding token")
    return vocabulary_digest(tokenizer)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything in `tokenizer` that affects a text's tokens.

    Truncation and padding, which the tokenizer keeps from its last call, do not count. Raises ConfigError for a slow
    tokenizer.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} must be fast (tokenizers library)")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest_of(state | {"truncation": None, "padding": None}, tokenizer.truncation_side)
