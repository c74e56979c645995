"""Causal language models: targets of texts and responses, and losses, agree with Transformers and PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import load_data
from copra_fl.models.build import load_processor
from copra_fl.models.export import load, save
from copra_fl.models.merged import export_merged
from copra_fl.models.own_logits import own_logits
from copra_fl.reporting import report
from copra_fl.reporting.tables import optional_columns, results_table
from copra_fl.simulation.recipes import Recipe
from copra_fl.tasks import find_task
from copra_fl.tasks.causal_lm import NO_TARGET, opening, response, truncate, with_template
from copra_fl.training.evaluation import evaluate
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings
from tests.support.worlds import World, assert_alike, jitter


@pytest.fixture(scope="session")
def spoken(texts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of unique texts of 1 to 8 words, each a response to the previous one."""
    rows = pd.read_csv(texts).drop_duplicates("text")
    rows["text"] = [" ".join(text.split()[: 8 - i % 8]) for i, text in enumerate(rows["text"])]
    rows["prompt"] = rows["text"].shift(fill_value="sea0")
    path = tmp_path_factory.mktemp("spoken") / "spoken.csv"
    rows.drop_duplicates("text").to_csv(path, index=False)
    return str(path)


@pytest.fixture
def plain(tiny: Settings, tiny_llama: str, spoken: str) -> Settings:
    return tiny | {
        "task": "causal-lm",
        "model": tiny_llama,
        "dataset": spoken,
        "target-modules": "q_proj,v_proj",
        "partitioner": "natural",
        "client-column": "owner",
        "max-length": 24,
    }


@pytest.fixture(params=["texts", "responses"])
def settings(plain: Settings, request: pytest.FixtureRequest) -> Settings:
    return plain | ({"prompt-column": "prompt"} if request.param == "responses" else {})


@pytest.mark.parametrize("duplicates", ["exact", "near"])
def test_equal_responses_to_other_prompts_are_other_examples(
    plain: Settings, spoken: str, duplicates: str, tmp_path: Path
) -> None:
    """Two responses in all, each to many prompts; without the prompts all examples are equal to another."""
    rows = pd.read_csv(spoken)
    rows["text"] = [f"sea{number % 2}" for number in range(len(rows))]
    rows["prompt"] = [f"sky{number}" for number in range(len(rows))]
    rows.to_csv(tmp_path / "short.csv", index=False)
    flat = plain | {"dataset": str(tmp_path / "short.csv"), "duplicates": duplicates}
    config = Config.from_flat(flat | {"prompt-column": "prompt"})
    assert len(load_data(config, load_processor(config.model)).test) == config.data.test_examples
    config = Config.from_flat(flat)
    with pytest.raises(ConfigError, match="nothing is left of the test set"):
        load_data(config, load_processor(config.model))


def test_the_loss_equals_that_of_transformers(settings: Settings) -> None:
    """Oracle: the loss of PEFT's model on Transformers' causal Llama, which shifts `labels` itself."""
    world = World(settings)
    indices = world.data.server_validation
    batch = world.data.examples.batch(indices)
    with torch.inference_mode():
        world.plain.write_adapter(world.start)
        output = world.plain.peft(**batch)
    is_target = batch["labels"][:, 1:] != NO_TARGET
    right = (output.logits[:, :-1].argmax(2) == batch["input_ids"][:, 1:])[is_target]
    expected = {
        "loss": float(output.loss),
        "accuracy": float(right.double().mean()),
        "perplexity": math.exp(output.loss),
        "examples": len(indices),
    }
    assert int(is_target.sum()) == world.data.examples.num_targets[indices].sum()
    for model in (world.plain, world.stacked):
        for metrics in evaluate(model, [world.start] * 2, world.data.examples, indices, 14):
            assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tiny_factored", ["granite", "cohere", "gemma2", "hyperclovax"], indirect=True)
def test_the_loss_is_that_of_a_model_with_factors_on_its_logits(plain: Settings, tiny_factored: str) -> None:
    """Oracle: the loss of PEFT's model on Transformers' class, which applies the factors itself."""
    world = World(plain | {"model": tiny_factored})
    indices = world.data.server_validation
    world.plain.write_adapter(world.start)
    with torch.inference_mode():
        expected = float(world.plain.peft(**world.data.examples.batch(indices)).loss)
    for model in (world.plain, world.stacked):
        for metrics in evaluate(model, [world.start] * 2, world.data.examples, indices, 14):
            assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    (update,) = world.together(0)
    assert_alike(update, world.alone(0), 1e-5)


def test_a_factor_that_the_model_itself_ignores_is_ignored() -> None:
    config = MptConfig(vocab_size=30, d_model=32, n_heads=4, n_layers=1, logit_scale=5.0)
    model, tokens = MptForCausalLM(config).eval(), torch.arange(8).view(1, 8)
    with torch.inference_mode():
        logits = own_logits(config, model.lm_head(model.transformer(tokens).last_hidden_state))
        assert torch.equal(logits, model(tokens).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "ffa-lora-gram"},
        {"gradient-accumulation": 3, "lora-dropout": 0.2},
    ],
)
def test_clients_train_together_as_if_alone(settings: Settings, changes: Settings) -> None:
    """Oracle: `train_client`, plain PEFT. Every step has its own mask."""
    world = World(settings | {"local-steps": 10, "num-rounds": 4} | changes)
    updates = world.together(*range(6))
    assert {0 < sum(update.active_steps) < 30 for update in updates} == {True}
    for update in updates:
        assert_alike(update, world.alone(update.client), 1e-5)


def test_targets_are_the_text_or_the_response_with_the_end_of_its_turn(
    settings: Settings, spoken: str, tiny_llama: str
) -> None:
    """For plain texts every token after BOS is a target; for conversations the response and EOS."""
    examples, tokenizer = World(settings).data.examples, AutoTokenizer.from_pretrained(tiny_llama)
    rows = pd.read_csv(spoken)
    batch = examples.batch(np.arange(len(rows)))
    for row, ids, labels in zip(rows.itertuples(), batch["input_ids"], batch["labels"], strict=True):
        prompt = f"<s> user {row.prompt} </s> assistant" if "prompt-column" in settings else "<s>"
        assert tokenizer.decode(labels[labels != NO_TARGET]) == f"{row.text} </s>"
        assert tokenizer.decode(ids[: len(f"{prompt} {row.text} </s>".split())]) == f"{prompt} {row.text} </s>"


def test_without_a_template_a_prompt_ends_with_a_line_break(tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    assert opening(tokenizer, "who is there") == "<s>who is there\n"
    assert response(tokenizer, "who is there", "it is I") == "it is I</s>"


def test_a_prompt_template_writes_prompts_as_flowertune_does(tiny_llama: str) -> None:
    """Oracle: the format string of Flower's baseline (adap/flower, examples/flowertune-llm, dataset.py)."""
    config = Recipe.read("flowertune", []).config("lora", 0)
    tokenizer = with_template(AutoTokenizer.from_pretrained(tiny_llama), config.data.prompt_template)
    message = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    instruction, answer = 'say "sea1 {{ sky1 }}"\\n', "sky2"
    text = f"{message}\n### Instruction:\n{instruction}\n### Response: {answer}"
    assert opening(tokenizer, instruction) + response(tokenizer, instruction, answer) == f"<s>{text}</s>"


def test_a_prompt_template_goes_with_the_adapter(plain: Settings, tmp_path: Path) -> None:
    run = run_federation(
        plain | {"prompt-column": "prompt", "prompt-template": "sea1 {prompt} sky1 "}, tmp_path / "run"
    )
    for tokenizer in (load(run / "adapter").processor, AutoTokenizer.from_pretrained(run / "adapter")):
        assert opening(tokenizer, "sea2") == "<s>sea1 sea2 sky1 "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt-template": "user {text}"}, r"'user \{text\}' must contain \{prompt\} once"),
        ({"prompt-template": "{prompt}", "prompt-column": ""}, "'{prompt}' needs prompt-column"),
    ],
)
def test_a_prompt_template_without_its_prompt_is_rejected(plain: Settings, changes: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World(plain | {"prompt-column": "prompt"} | changes)


def test_a_template_with_another_generation_prompt_is_refused(tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant '", "'think '")
    with pytest.raises(ConfigError, match="cannot locate the response"):
        response(tokenizer, "who is there", "it is I")


@pytest.mark.parametrize(
    ("before", "targets", "kept"),
    [(1, 20, (1, 7)), (0, 20, (0, 8)), (10, 3, (5, 3)), (10, 20, (4, 4)), (3, 20, (3, 5)), (3, 2, (3, 2))],
)
def test_truncation_drops_the_start_of_the_prompt_and_the_end_of_the_response(
    before: int, targets: int, kept: tuple[int, int]
) -> None:
    first, last = truncate(list(range(before)), list(range(targets)), max_length=8)
    assert (len(first), len(last)) == kept
    assert first == list(range(before))[before - len(first) :] and last == list(range(len(last)))


def test_a_run_exports_an_adapter_that_peft_alone_opens(settings: Settings, tmp_path: Path) -> None:
    """Oracle: the losses of `AutoPeftModelForCausalLM` on the test examples and on those of held-out clients."""
    settings = settings | {"p0": 0.5, "num-clients": 4, "held-out-clients": 2}
    run = run_federation(settings, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    data = World(settings).data
    opened = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    for name, indices in (("test", data.test), ("held_out", data.held_out)):
        batch = data.examples.batch(indices)
        with torch.inference_mode():
            loss = float(opened(**batch).loss)
            with opened.disable_adapter():
                assert abs(float(opened(**batch).loss) - loss) > 1e-3
        assert summary[name]["loss"] == pytest.approx(loss, rel=1e-4)
        assert summary[name]["metrics"] == pytest.approx({"perplexity": math.exp(loss)}, rel=1e-4)
        assert summary[name]["examples"] == len(indices)

    (run / "config.toml").write_text(Config.from_flat(settings).to_toml())
    compared = report.write(run)
    results = results_table(compared, optional_columns(compared))
    row, _ = results.rows  # the second is the model before round 1
    shown = dict(zip(results.header, row, strict=True))
    assert shown["held-out perplexity"] == f"{summary['held_out']['metrics']['perplexity']:.2f}"
    assert shown["held-out clients, %"] == f"{100 * summary['held_out']['accuracy']:.1f}"


def test_a_diverged_model_has_a_finite_perplexity() -> None:
    assert find_task("causal-lm").metrics(1e6, 0.0)["perplexity"] == pytest.approx(1.01e304, rel=0.01)


def test_merging_an_adapted_output_layer_leaves_the_tied_input_embedding(
    plain: Settings, tiny_llama: str, tmp_path: Path
) -> None:
    """Oracle: the logits of PEFT's model before merging, on Transformers' tied model."""
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    config = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    world = World(plain | {"model": str(tmp_path / "base"), "target-modules": "q_proj,lm_head", "engine": "peft"})
    world.plain.write_adapter(jitter(world.start, 4, 0.3))
    save(world.plain, tmp_path / "adapter", [], world.config.data)
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens, embedding = torch.arange(8).view(1, 8), opened.get_input_embeddings().weight.clone()
    export_merged(tmp_path / "adapter", tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        expected = opened(input_ids=tokens).logits
        assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-5)
        with opened.disable_adapter():
            assert float((opened(input_ids=tokens).logits - expected).abs().max()) > 0.1
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
