"""Label words: scores, training and exports agree with Transformers' and PEFT's causal language models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoTokenizer, pipeline

from copra_fl.config import ConfigError
from copra_fl.models.export import load, save
from copra_fl.models.merged import export_merged
from copra_fl.training.evaluation import evaluate
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings
from tests.support.worlds import World, assert_alike

WORDS = ["sand5 sea0", "sky1", "sea2"]  # of the labels sand, sea and sky; only the first token of a word counts
MAX_LENGTH = 11


@pytest.fixture
def settings(tiny: Settings, tiny_llama: str) -> Settings:
    return tiny | {
        "task": "label-words",
        "model": tiny_llama,
        "target-modules": "q_proj,v_proj",
        "prompt-template": "user {text}\nassistant sea11",
        "label-words": ",".join(WORDS),
        "max-length": MAX_LENGTH,
    }


def prompts(settings: Settings, texts: list[str]) -> list[list[int]]:
    """Return the prompts, word by word: of a text of 8 words, 11 - 4 = 7 remain."""
    tokenizer = AutoTokenizer.from_pretrained(str(settings["model"]))
    words = [["<s>", "user", *text.split()[: MAX_LENGTH - 4], "assistant", "sea11"] for text in texts]
    return [tokenizer.convert_tokens_to_ids(prompt) for prompt in words]


def scores(model: torch.nn.Module, settings: Settings, texts: list[str]) -> Tensor:
    """Return the (texts, labels) logits of a causal model of Transformers or PEFT, text by text, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(str(settings["model"]))
    columns = tokenizer.convert_tokens_to_ids(["sand5", "sky1", "sea2"])
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, -1, columns] for ids in prompts(settings, texts)]
    return torch.stack(rows)


def expected_metrics(logits: Tensor, labels: list[str]) -> dict[str, float]:
    numbers = torch.tensor([["sand", "sea", "sky"].index(label) for label in labels])
    logs = logits.double() - logits.double().logsumexp(1, keepdim=True)
    return {
        "loss": float(-logs[torch.arange(len(numbers)), numbers].mean()),
        "accuracy": float((logits.argmax(1) == numbers).double().mean()),
    }


def test_scores_and_loss_are_those_of_transformers_at_the_last_token(settings: Settings) -> None:
    world, rows = World(settings), pd.read_csv(str(settings["dataset"]))
    indices = world.data.server_validation
    chosen = rows.iloc[indices]
    world.plain.write_adapter(world.start)
    logits = scores(world.plain.peft, settings, chosen["text"].tolist())
    with torch.inference_mode():
        assert torch.allclose(world.plain(**world.data.examples.batch(indices)), logits, atol=1e-5)
    expected = expected_metrics(logits, chosen["label"].tolist()) | {"examples": len(indices)}
    for model in (world.plain, world.stacked):
        for metrics in evaluate(model, [world.start] * 2, world.data.examples, indices, 14):
            assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tiny_factored", "targets"),
    [("minicpm3", "q_b_proj"), ("gemma2", "q_proj")],
    indirect=["tiny_factored"],
)
def test_scores_have_the_factors_of_the_model(
    settings: Settings, tiny_factored: str, targets: str, tmp_path: Path
) -> None:
    """Oracle: PEFT's model. A merged classifier has a factor in its head, and none caps its logits as Gemma 2 does."""
    world, texts = (
        World(settings | {"model": tiny_factored, "target-modules": targets}),
        ["sea1 sea2", "sand1 sky2 sky3"],
    )
    world.plain.write_adapter(world.start)
    logits = scores(world.plain.peft, settings, texts)
    save(world.plain, tmp_path / "adapter", ["sand", "sea", "sky"], world.config.data)
    saved = load(tmp_path / "adapter", device="cpu")
    with torch.inference_mode():
        assert torch.allclose(saved.model(**saved.processor(texts)), logits, atol=1e-5)
    if world.plain.base.config.model_type == "gemma2":
        with pytest.raises(ConfigError, match="this model caps its logits at 0.2"):
            export_merged(tmp_path / "adapter", tmp_path / "merged", "float32")
        return
    export_merged(tmp_path / "adapter", tmp_path / "merged", "float32")
    classify = pipeline("text-classification", str(tmp_path / "merged"))
    answers = [{entry["label"]: entry["score"] for entry in row} for row in classify(texts, top_k=None)]
    probabilities = [[answer[label] for label in saved.labels] for answer in answers]
    assert torch.allclose(torch.tensor(probabilities), logits.softmax(1), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"off": "global"}, {"gradient-accumulation": 3, "lora-dropout": 0.2}],
)
def test_clients_train_together_as_if_alone(settings: Settings, changes: Settings) -> None:
    """Oracle: `train_client`, plain PEFT. Every step has its own mask."""
    world = World(settings | {"local-steps": 6, "num-rounds": 3, "shots": 5} | changes)
    updates = world.together(*range(6))
    assert {0 < sum(update.active_steps) < 18 for update in updates} == {True}
    for update in updates:
        assert not any("head" in name for name in update.adapter)
        assert_alike(update, world.alone(update.client), 1e-5)


def test_a_run_exports_an_adapter_that_peft_alone_scores_with(settings: Settings, tmp_path: Path) -> None:
    """Oracle: `AutoPeftModelForCausalLM` on the test texts; `copra_fl.load` takes texts."""
    settings = settings | {"local-training": "lora", "learning-rate": 0.02, "path-pairs": 0}
    run, rows = run_federation(settings, tmp_path / "run"), pd.read_csv(str(settings["dataset"]))
    test = rows.iloc[World(settings).data.test]
    texts = test["text"].tolist()
    opened = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    logits = scores(opened, settings, texts)
    expected = expected_metrics(logits, test["label"].tolist())
    with opened.disable_adapter():
        assert float((scores(opened, settings, texts) - logits).abs().max()) > 1e-2
    summary = json.loads((run / "summary.json").read_text())["test"]
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-4)

    saved = load(run / "adapter", device="cpu")
    assert saved.labels == ["sand", "sea", "sky"]
    short = [" ".join(text.split()[: 4 + i % 4]) for i, text in enumerate(texts[:8])]
    with torch.inference_mode():
        assert torch.allclose(saved.model(**saved.processor(short)), scores(opened, settings, short), atol=1e-5)
    export_merged(run / "adapter", tmp_path / "merged", "float32")
    classify = pipeline("text-classification", str(tmp_path / "merged"), batch_size=3)
    answers = [
        {entry["label"]: entry["score"] for entry in row} for row in classify(texts, top_k=None, truncation=True)
    ]
    probabilities = [[answer[label] for label in saved.labels] for answer in answers]
    assert torch.allclose(torch.tensor(probabilities), logits.softmax(1), atol=1e-5)


def test_without_words_the_labels_are_the_words(settings: Settings, tmp_path: Path) -> None:
    rows = pd.read_csv(str(settings["dataset"]))
    rows["label"] = rows["label"] + "7"
    rows.to_csv(tmp_path / "rows.csv", index=False)
    world = World(settings | {"dataset": str(tmp_path / "rows.csv"), "label-words": ""})
    tokenizer = AutoTokenizer.from_pretrained(str(settings["model"]))
    (row,) = world.data.examples.batch(np.array([0]))["label_tokens"]
    assert tokenizer.convert_ids_to_tokens(row) == ["sand7", "sea7", "sky7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt-template": "user {label}"}, r"'user \{label\}' must contain \{text\} once"),
        ({"max-length": 4}, "takes 4 of max-length = 4 tokens and leaves none"),
        ({"label-words": "sea1,sky1"}, "has 2 words for 3 labels, which are, in order, sand,sea,sky"),
        ({"label-words": "sea1 a,sky1,sea1 b"}, "'sea1 a' and 'sea1 b' begin with the same token"),
        ({"label-words": "sea1,sky1, "}, "'' has no tokens of its own after prompt-template = 'user {text}"),
        ({"target-modules": "q_proj,lm_head"}, "'lm_head' is the output layer, which task = 'label-words' uses frozen"),
    ],
)
def test_templates_and_words_that_cannot_work_are_refused(settings: Settings, changes: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World(settings | changes)
