"""A tiny real world: a randomly initialised BERT with its tokenizer, and texts that can be told apart."""

from __future__ import annotations

import os
from pathlib import Path

# Read once, when torch and transformers are imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # see copra_fl/process.py
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

WORDS = [f"{topic}{i}" for topic in ("sea", "sky", "sand") for i in range(12)]
TOPICS = ("sea", "sky", "sand")
NUM_LAYERS = 3


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a BERT with 3 layers, 32 wide, random weights, and its word-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    shape = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(directory)
    return str(directory)


#: every turn ends with EOS, and a line break that nobody needs
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn['role'] + ' ' + turn['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a causal Llama with 3 layers, 32 wide, random weights; its tokenizer has a chat template, no padding."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {word: i for i, word in enumerate([*names.values(), "user", "assistant", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT_TEMPLATE, **names)
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(vocabulary), intermediate_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=None, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def make_texts(path: Path, num_examples: int = 600, seed: int = 0) -> Path:
    """A CSV whose label is the topic of most of a text's words; `owner` is one of 6 people."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_examples):
        topic = TOPICS[i % 3]
        words = [f"{topic if rng.random() < 0.6 else rng.choice(TOPICS)}{rng.integers(12)}" for _ in range(8)]
        rows.append({"text": " ".join(words), "label": topic, "owner": f"owner-{i % 6}"})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_texts(tmp_path_factory.mktemp("texts") / "texts.csv"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests fetch assets and keep tokens in a cache of their own."""
    os.environ["COPRA_FL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without any asset."""
    monkeypatch.setenv("COPRA_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give pip a package index that does not answer."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture(scope="session")
def tiny(tiny_model: str, texts: str) -> dict[str, object]:
    """Settings of a federation that runs in a second: 6 clients, 2 rounds of 3 steps."""
    return {
        "model": tiny_model,
        "dataset": texts,
        "num-clients": 6,
        "num-rounds": 2,
        "local-steps": 3,
        "batch-size": 4,
        "rank": 2,
        "max-length": 16,
        "server-validation-examples": 60,
        "test-examples": 60,
        "path-pairs": 1,
        "path-points": 3,
        "path-examples": 30,
        "device": "cpu",
        "dtype": "float32",
    }
