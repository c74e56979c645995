"""Text classification by a causal language model without a trained head: each label has a word, the verbalizer.

    BOS, template with the text in place of {text}  --base-->  last token  --output layer-->  score of each label's word

``prompt-template`` is the template, and ``label-words`` the words in the order of the labels (by default the labels
themselves). A label's score is the logit of the first token of its word, which continues the prompt after a space; so
the words must begin with different tokens. The loss is the cross-entropy over the labels' scores, not over the
vocabulary, as in LM-BFF (Gao et al. 2021, arXiv 2012.15723), which does so with masked language models and words of one
token. It is in nats, and ln(number of labels) at chance, as in the other classification tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from copra_fl.config import ConfigError, DataConfig, csv_line, csv_list
from copra_fl.files import digest_of
from copra_fl.sources.tables import codes
from copra_fl.tasks.causal_lm import beginning, require_eos
from copra_fl.tasks.task import Inputs
from copra_fl.tasks.text_classification import LabeledTexts, TextClassification
from copra_fl.tasks.texts import join_tokens, tokenize, vocabulary_digest

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

#: the place of the text in a template
TEXT = "{text}"
#: used where ``prompt-template`` is empty
DEFAULT_TEMPLATE = "{text}\nLabel:"


@dataclass(frozen=True)
class PromptedTexts(LabeledTexts):
    """Texts in a prompt, with labels.

    Attributes:
        label_tokens: (L,) int64, the first token of each label's word.
    """

    label_tokens: Tensor

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the batch of `LabeledTexts`, and ``label_tokens`` (B, L) int64, the same in each row."""
        label_tokens = self.label_tokens.to(device, non_blocking=True).expand(len(indices), -1)
        return super().batch(indices, device) | {"label_tokens": label_tokens}


@dataclass(frozen=True)
class Prompter:
    """Text to the inputs of the model, for a template and the words of the labels.

    Its call is that of a tokenizer: ``model(**prompter(texts))`` gives the (texts, labels) scores.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    words: Sequence[str]

    def __call__(self, texts: str | Sequence[str], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` (B, T), padded on the right, and ``label_tokens`` (B, L)."""
        assert return_tensors == "pt", "only PyTorch tensors are returned"
        rows = [torch.tensor(tokens) for tokens in self.tokens([texts] if isinstance(texts, str) else texts)]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=int(self.tokenizer.eos_token_id)),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "label_tokens": torch.tensor(self.label_tokens()).expand(len(rows), -1),
        }

    def tokens(self, texts: Sequence[str], max_length: int = 0) -> list[list[int]]:
        """Return the tokens of each text's prompt; a text loses its end if a prompt has more than `max_length` (> 0).

        Raises ConfigError for a template without a place for the text, or that leaves no room for it.
        """
        first, last = self.frame()
        room = max_length - len(first) - len(last)
        if max_length and room < 1:
            raise ConfigError(
                f"prompt-template = {self.template!r} takes {len(first) + len(last)} of max-length = {max_length} "
                "tokens and leaves none for the text; increase max-length"
            )
        inside = tokenize(self.tokenizer, texts, add_special_tokens=False)
        return [[*first, *(text[:room] if max_length else text), *last] for text in inside]

    def frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens of the template before and after the text. Raises ConfigError as `tokens` does."""
        before, after = self._around
        first, last = tokenize(self.tokenizer, [beginning(self.tokenizer) + before, after], add_special_tokens=False)
        return first, last

    def framed_tokenizer(self, max_length: int) -> PreTrainedTokenizerFast:
        """Return the tokenizer as one that puts each text into the template, in place of BOS and EOS.

        It truncates a text, not the template, and pads with EOS.
        """
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        frame = {f"<template-{i}>": tokens for i, tokens in enumerate(self.frame()) if tokens}
        pieces = [
            {"id": name, "ids": tokens, "tokens": self.tokenizer.convert_ids_to_tokens(tokens)}
            for name, tokens in frame.items()
        ]
        before, after = (name if name in frame else "" for name in ("<template-0>", "<template-1>"))
        backend.post_processor = TemplateProcessing(single=f"{before} $A {after}".split(), special_tokens=pieces)
        names = {"eos_token": self.tokenizer.eos_token, "pad_token": self.tokenizer.eos_token}
        length = {"model_max_length": max_length} if max_length else {}
        return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **names, **length)

    def label_tokens(self) -> list[int]:
        """Return the first token of each word after the prompt and a space.

        Raises ConfigError for words that begin with the same token, and for a word without tokens of its own.
        """
        _, after = self._around
        prompt, *answers = tokenize(
            self.tokenizer, [after, *(f"{after} {word}" for word in self.words)], add_special_tokens=False
        )
        first: dict[int, str] = {}
        for word, answer in zip(self.words, answers, strict=True):
            if answer[: len(prompt)] != prompt or len(answer) == len(prompt):
                raise ConfigError(
                    f"label-words: {word!r} has no tokens of its own after prompt-template = {self.template!r}; "
                    "write a word, and end the template without a space"
                )
            token = answer[len(prompt)]
            if token in first:
                raise ConfigError(
                    f"label-words: {first[token]!r} and {word!r} begin with the same token of the model's tokenizer; "
                    "set label-words to words that differ in their first token, one for each label"
                )
            first[token] = word
        return list(first)

    @property
    def _around(self) -> list[str]:
        """The template before and after the text. Raises ConfigError for a template without one place for it."""
        if self.template.count(TEXT) != 1:
            raise ConfigError(f"prompt-template = {self.template!r} must contain {TEXT} once, in place of the text")
        return self.template.split(TEXT)


class LabelWords(TextClassification):
    options = ("prompt-template", "label-words")
    trains_head = False
    adapts_output_layer = False
    model_class = AutoModelForCausalLM
    peft_type = "CAUSAL_LM"

    def processor_digest(self, processor: Any) -> str:
        require_eos(processor)
        return digest_of(vocabulary_digest(processor), processor.bos_token, processor.eos_token)

    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        prompter = self.prompter(processor, labels, data.prompt_template, data.label_words)
        tokens = join_tokens(prompter.tokens(rows["text-column"].tolist(), data.max_length))
        label_tokens = torch.tensor(prompter.label_tokens(), dtype=torch.int64)
        return {"labels": codes(rows["label-column"], labels), "label_tokens": label_tokens, **tokens}

    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> PromptedTexts:
        tokens = tensors["input_ids"], tensors["offsets"]
        pad_id = int(processor.eos_token_id)
        return PromptedTexts(*tokens, pad_id, data.max_length, tensors["labels"], tensors["label_tokens"])

    def prompter(self, tokenizer: Any, labels: Sequence[str], template: str, words: str) -> Prompter:
        """Return the prompter of `words`, a line of CSV in the order of `labels`; empty: the labels themselves.

        Raises ConfigError for another number of words than labels.
        """
        listed = csv_list(words) or list(labels)
        if len(listed) != len(labels):
            raise ConfigError(
                f"label-words = {words!r} has {len(listed)} words for {len(labels)} labels, which are, in order, "
                f"{csv_line(labels)}"
            )
        return Prompter(tokenizer, template or DEFAULT_TEMPLATE, listed)

    def opened_processor(self, processor: Any, labels: list[str], options: Mapping[str, str]) -> Prompter:
        return self.prompter(processor, labels, options["prompt-template"], options["label-words"])

    def saved_processor(self, opened: Prompter) -> PreTrainedTokenizerBase:
        return opened.tokenizer

    def inputs(self, batch: Inputs) -> dict[str, Any]:
        inputs = super().inputs(batch) | {"use_cache": False}
        inputs.pop("label_tokens", None)
        return inputs

    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        last = batch["attention_mask"].sum(1) - 1
        return output.last_hidden_state[torch.arange(len(last), device=last.device), last]

    def frozen_logits(self, output_layer: nn.Module, features: Tensor, batch: Inputs) -> Tensor:
        """Return the (texts, labels) logits of the labels' tokens, in float32 or wider."""
        tokens, dtype = batch["label_tokens"][0], torch.promote_types(features.dtype, torch.float32)
        bias = getattr(output_layer, "bias", None)
        weight = output_layer.get_parameter("weight")[tokens].to(dtype)
        return F.linear(features.to(dtype), weight, None if bias is None else bias[tokens].to(dtype))

    def frozen_head(self, output_layer: nn.Module, processor: Prompter) -> nn.Linear:
        """Return the rows of the labels' tokens as a linear layer."""
        tokens, bias = torch.tensor(processor.label_tokens()), getattr(output_layer, "bias", None)
        weight = output_layer.get_parameter("weight")[tokens]
        head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
        head.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            head.bias = nn.Parameter(bias[tokens].detach().clone())
        return head

    def classifier_processor(self, processor: Prompter, max_length: int) -> PreTrainedTokenizerFast:
        return processor.framed_tokenizer(max_length)


TASK = LabelWords()
