"""Causal language modeling with the base's own frozen output layer: of whole texts, or of responses to prompts.

    plain text        BOS | text EOS               targets: the text and EOS
    with a prompt     prompt | response EOS        targets: the response and EOS; the prompt is only read

With ``prompt-column`` set, ``prompt-template``, or else the tokenizer's chat template, renders prompt and response as
turns of user and assistant; without a template the input is BOS, the prompt, a line break, the response, EOS. Because
vocabularies are large, logits are computed for targets only.
"""

from __future__ import annotations

import copy
import json
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
from copra_fl.tasks.texts import Texts, join_tokens, tokenize, vocabulary_digest

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

#: the label of a token that is not a target, as in Transformers
NO_TARGET = -100

#: the place of the prompt in a template
PROMPT = "{prompt}"

#: losses are cut to this before exp, which overflows a float at 710
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Continuations(Texts):
    """Tokenized texts whose last tokens are targets.

    Attributes:
        targets_from: (N,) int64, index of the first target token of each example; at least 1, because token 0 has no
            predecessor.
    """

    targets_from: Tensor

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(N,) number of target tokens of each example, at least 1."""
        return self.lengths - self.targets_from.numpy()

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the examples `indices`, padded on the right to the longest of them, on `device`.

        The tensors are ``input_ids``, ``attention_mask`` and ``labels``, all (B, T) int64, and ``targets`` (targets,)
        int64, the target tokens. Labels are the target tokens, not shifted, or NO_TARGET, as Transformers' causal
        models expect them.
        """
        batch = self.inputs(indices)
        places = torch.arange(batch["input_ids"].shape[1])
        is_target = (places >= self.targets_from[torch.as_tensor(indices), None]) & (batch["attention_mask"] > 0)
        batch["labels"] = batch["input_ids"].where(is_target, NO_TARGET)
        batch["targets"] = batch["input_ids"][is_target]
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer with `template` as its chat template; the same tokenizer if `template` is empty.

    A turn of the user is the template with the prompt in its place, one of the assistant the response and EOS. Raises
    ConfigError for a template without one place for the prompt.
    """
    if not template:
        return tokenizer
    if template.count(PROMPT) != 1:
        raise ConfigError(f"prompt-template = {template!r} must contain {PROMPT} once, in place of the prompt")
    before, after = (json.dumps(part) for part in template.split(PROMPT))
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token or '' }}{% for turn in messages %}{% if turn['role'] == 'user' %}"
        f"{{{{ {before} + turn['content'] + {after} }}}}"
        "{% else %}{{ turn['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def opening(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the text before the response to `prompt`."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return f"{beginning(tokenizer)}{prompt}\n"


def beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text before a plain text: BOS, or nothing if the tokenizer has no BOS."""
    return tokenizer.bos_token or ""


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for a tokenizer without EOS, which ends texts and pads batches."""
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} needs a token that ends a text (EOS)")


def response(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> str:
    """Return the text after `opening` for the response `text`, up to the end of its turn.

    Raises ConfigError for a chat template that renders a response differently from its own generation prompt.
    """
    if not tokenizer.chat_template:
        return text + tokenizer.eos_token
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    whole, before = str(tokenizer.apply_chat_template(turns, tokenize=False)), opening(tokenizer, prompt)
    if not whole.startswith(before):
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} opens a response with {before!r} but renders the whole "
            f"conversation as {whole!r}: cannot locate the response in it; use a tokenizer with a consistent template"
        )
    return whole[len(before) :].rstrip()


def truncate(before: list[int], targets: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Truncate both parts to `max_length` tokens together: `before` loses its first tokens, `targets` its last ones.

    Targets keep at least half of `max_length` tokens, if they have that many.
    """
    targets = targets[: max_length - min(len(before), max_length // 2)]
    return before[max(0, len(before) + len(targets) - max_length) :], targets


class CausalLM(Task):
    columns = ("text-column",)
    optional_columns = ("prompt-column",)
    options = ("prompt-template",)
    labels = "none"
    trains_head = False
    model_class = AutoModelForCausalLM
    peft_type = "CAUSAL_LM"
    classifier_class = None
    pipeline = "text-generation"
    version = 3

    def processor_digest(self, processor: Any) -> str:
        require_eos(processor)
        special = processor.chat_template, processor.bos_token, processor.eos_token
        return digest_of(vocabulary_digest(processor), special)

    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        texts = rows["text-column"].tolist()
        if data.prompt_template and "prompt-column" not in rows:
            raise ConfigError(f"prompt-template = {data.prompt_template!r} needs prompt-column, the column of prompts")
        processor = with_template(processor, data.prompt_template)
        if "prompt-column" in rows:
            prompts = rows["prompt-column"].tolist()
            befores = [opening(processor, prompt) for prompt in prompts]
            texts = [response(processor, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        else:
            befores = [beginning(processor)] * len(texts)
            texts = [text + processor.eos_token for text in texts]
        tokens = (tokenize(processor, part, add_special_tokens=False) for part in (befores, texts))
        pairs = [truncate(before, targets, data.max_length) for before, targets in zip(*tokens, strict=True)]
        targets_from = torch.tensor([max(1, len(before)) for before, _ in pairs], dtype=torch.int64)
        return join_tokens(before + targets for before, targets in pairs) | {"targets_from": targets_from}

    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> Continuations:
        tokens = tensors["input_ids"], tensors["offsets"]
        return Continuations(*tokens, int(processor.eos_token_id), data.max_length, tensors["targets_from"])

    def opened_processor(self, processor: Any, labels: list[str], options: Mapping[str, str]) -> Any:
        return with_template(processor, options.get("prompt-template", ""))  # absent in folders of earlier versions

    def inputs(self, batch: Inputs) -> dict[str, Any]:
        inputs = super().inputs(batch) | {"use_cache": False}
        inputs.pop("targets", None)
        return inputs

    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        """Return the hidden states at the positions before the targets, (targets, D).

        The number of targets is known before the device has computed where they are, so nothing waits for it.
        """
        is_next_a_target = batch["labels"].flatten()[1:] != NO_TARGET  # the first token of a row is none
        positions = is_next_a_target.nonzero_static(size=len(batch["targets"])).squeeze(1)
        return output.last_hidden_state.flatten(0, 1).index_select(0, positions)

    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        return F.cross_entropy(logits, batch["targets"], reduction="none")

    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        return logits.argmax(1) == batch["targets"]

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, LARGEST_LOSS))}


TASK = CausalLM()
