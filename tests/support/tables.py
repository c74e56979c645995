"""Tables of random texts with labels and owners, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from copra_fl.config import Config

CLASSES = ("air", "fire", "sea", "soil")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a word for each digit and class. Padding is not token 0, so a wrong id cannot pass."""
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", *CLASSES, "[PAD]", *map(str, range(10))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def make_rows(number: int = 600) -> pd.DataFrame:
    """Return unique texts of 2 to 13 words with a label and one of 12 owners of unequal size."""
    rows = []
    for i in range(number):
        label = CLASSES[i % len(CLASSES)]
        text = " ".join([label] * (1 + i % 10) + list(str(i)))
        rows.append({"text": text, "label": label, "owner": int((i % 72 * 2) ** 0.5)})
    return pd.DataFrame(rows)


def make_config(dataset: Path | str, **changes: Any) -> Config:
    flat = {"dataset": str(dataset), "num_clients": 6, "server_validation_examples": 40, "test_examples": 60} | changes
    return Config.from_flat({name.replace("_", "-"): value for name, value in flat.items()})
