"""The next token, by the base's own frozen output layer: of whole texts, or of the responses to prompts.

    plain text        BOS | text EOS               learnt: the text, and where it ends
    with a prompt     prompt | response EOS        learnt: the response; the prompt is only read

With ``prompt-column`` set, the tokenizer's chat template writes prompt and response as turns of user and assistant; a
tokenizer without one gets BOS, the prompt, a line break, the response, EOS. Logits are computed where something is
learnt and nowhere else: a vocabulary is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from copra_fl.config import ConfigError, DataConfig
from copra_fl.files import digest_of
from copra_fl.tasks.task import Inputs, Task
from copra_fl.tasks.texts import Texts, join_tokens, tokenise, vocabulary_digest

if TYPE_CHECKING:  # slow to import, and needed only where the cache is empty
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

#: the label of a token that is not learnt, as in Transformers
NOT_LEARNT = -100

#: from here on exp overflows a float
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Continuations(Texts):
    """
    Attributes:
        learnt_from: (N,) int64, the first token of each example that is learnt, at least 1: none comes before token 0.
    """

    learnt_from: Tensor

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(N,) tokens that are learnt of each example, one or more."""
        return self.lengths - self.learnt_from.numpy()

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The examples `indices`, padded on the right to the longest of them.

        Returns ``input_ids``, ``attention_mask`` and ``labels``, all (B, T) int64, on `device`. Labels are the tokens
        themselves, not shifted, or NOT_LEARNT, as Transformers' causal models take them.
        """
        batch = self.inputs(indices)
        places = torch.arange(batch["input_ids"].shape[1])
        learnt = (places >= self.learnt_from[torch.as_tensor(indices), None]) & (batch["attention_mask"] > 0)
        batch["labels"] = batch["input_ids"].where(learnt, NOT_LEARNT)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def opening(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """All that comes before the response to `prompt`."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return f"{beginning(tokenizer)}{prompt}\n"


def beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """What comes before a plain text: BOS, where the tokenizer has it."""
    return tokenizer.bos_token or ""


def response(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> str:
    """What comes after `opening` where `text` is the response, up to the end of its turn.

    Raises ConfigError for a chat template that does not write a response after its own opening.
    """
    if not tokenizer.chat_template:
        return text + tokenizer.eos_token
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    whole, before = str(tokenizer.apply_chat_template(turns, tokenize=False)), opening(tokenizer, prompt)
    if not whole.startswith(before):
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} opens a response with {before!r}, but writes the whole "
            f"conversation as {whole!r}: which part is the response cannot be told"
        )
    return whole[len(before) :].rstrip()


def cut(before: list[int], learnt: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Both cut to `max_length` tokens together: `before` loses its first ones, `learnt` its last ones.

    What is learnt keeps half of them at least, where it has as many.
    """
    learnt = learnt[: max_length - min(len(before), max_length // 2)]
    return before[max(0, len(before) + len(learnt) - max_length) :], learnt


class CausalLM(Task):
    columns = ("text-column",)
    optional_columns = ("prompt-column",)
    labels = "none"
    trains_head = False
    model_class = AutoModelForCausalLM
    peft_type = "CAUSAL_LM"

    def processor_digest(self, processor: Any) -> str:
        if processor.eos_token is None:
            raise ConfigError(f"the tokenizer of {processor.name_or_path!r} must have a token that ends a text")
        marks = processor.chat_template, processor.bos_token, processor.eos_token
        return digest_of(vocabulary_digest(processor), marks)

    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        texts = rows["text-column"].tolist()
        if "prompt-column" in rows:
            prompts = rows["prompt-column"].tolist()
            befores = [opening(processor, prompt) for prompt in prompts]
            texts = [response(processor, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        else:
            befores = [beginning(processor)] * len(texts)
            texts = [text + processor.eos_token for text in texts]
        tokens = (tokenise(processor, some, add_special_tokens=False) for some in (befores, texts))
        pairs = [cut(before, learnt, data.max_length) for before, learnt in zip(*tokens, strict=True)]
        learnt_from = torch.tensor([max(1, len(before)) for before, _ in pairs], dtype=torch.int64)
        return join_tokens(before + learnt for before, learnt in pairs) | {"learnt_from": learnt_from}

    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> Continuations:
        tokens = tensors["input_ids"], tensors["offsets"]
        return Continuations(*tokens, int(processor.eos_token_id), data.max_length, tensors["learnt_from"])

    def inputs(self, batch: Inputs) -> dict[str, Any]:
        return super().inputs(batch) | {"use_cache": False}

    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        return output.last_hidden_state[:, :-1][batch["labels"][:, 1:] != NOT_LEARNT]

    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        return F.cross_entropy(logits, _learnt(batch), reduction="none")

    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        return logits.argmax(1) == _learnt(batch)

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, LARGEST_LOSS))}


def _learnt(batch: Inputs) -> Tensor:
    """(targets,) the tokens that are learnt; each is predicted at the place before it."""
    labels = batch["labels"][:, 1:]
    return labels[labels != NOT_LEARNT]


TASK = CausalLM()
