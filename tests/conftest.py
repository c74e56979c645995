"""Fixtures of all tests: tiny randomly initialized models with tokenizers, tiny data sets, caches."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from tests.support.tables import make_rows, make_tokenizer
from tests.support.tiny import Settings

# Read once, when torch and transformers are imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # see copra_fl/startup.py
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.support.tiny import NUM_LAYERS, WORDS, make_texts

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"


def fail_on_deprecation(record: logging.LogRecord) -> bool:
    """Raise AssertionError in the code that uses a deprecated feature of Flower, which warns in its log alone."""
    assert "DEPRECATED FEATURE" not in str(record.msg), record.getMessage()
    return True


logging.getLogger("flwr").addFilter(fail_on_deprecation)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-rounds", type=int, default=40, help="rounds of tests/test_soak.py")
    parser.addoption("--soak-seed", type=int, default=0, help="seed of its kills")


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


#: every turn ends with EOS and a line break, which is not part of the turn
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


@pytest.fixture
def tiny_factored(tiny_llama: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Path of a tiny causal model of the type in `request.param`, which changes the logits of its output layer.

    The type is granite, cohere, gemma2, hyperclovax or minicpm3; the tokenizer is that of `tiny_llama`.
    """
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    factors: dict[str, dict[str, Any]] = {
        "granite": {"logits_scaling": 0.3},
        "cohere": {"logit_scale": 5.0},
        "gemma2": {"final_logit_softcapping": 0.2, "head_dim": 8, "layer_types": ["full_attention"] * NUM_LAYERS},
        "hyperclovax": {"logits_scaling": 3.0},
        "minicpm3": latent | {"num_key_value_heads": 4, "dim_model_base": 8},
    }
    shape = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape["intermediate_size"] = 64
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(request.param, **shape | tokens | factors[request.param])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_texts(tmp_path_factory.mktemp("texts") / "texts.csv"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a temporary cache for all tests."""
    os.environ["COPRA_FL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without any asset."""
    monkeypatch.setenv("COPRA_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
        "local-training": "copra",
        "max-length": 16,
        "server-validation-examples": 60,
        "test-examples": 60,
        "path-pairs": 1,
        "path-points": 3,
        "path-examples": 30,
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def rows() -> pd.DataFrame:
    return make_rows()


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPRA_FL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def own(tiny: Settings, tmp_path: Path) -> Settings:
    """The run's settings; the server's own file has other texts, and all three labels."""
    texts = pd.read_csv(str(tiny["dataset"])).rename(columns={"text": "note", "label": "topic"})
    texts.to_csv(tmp_path / "server.csv", index=False)
    columns = {"text-column": "note", "label-column": "topic"}
    return tiny | columns | {"dataset": str(tmp_path / "server.csv"), "partitioner": "own", "num-clients": 0}
