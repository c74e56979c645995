"""`copra-fl chat`, with a run of the tiny Llama."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

from copra_fl.config import Config
from tests.support.command_line import run_command
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings

PROMPTS = ("sea1 sky2 sand3", "sky4")


@pytest.fixture(scope="module")
def run(tiny: Settings, tiny_llama: str, texts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose labels are prompts."""
    model = {"task": "causal-lm", "model": tiny_llama, "target-modules": "all-linear", "prompt-column": "label"}
    settings = tiny | model | {"partitioner": "iid", "num-rounds": 1, "learning-rate": 0.05, "local-training": "lora"}
    folder = run_federation(settings, tmp_path_factory.mktemp("chat") / "run")
    (folder / "config.toml").write_text(Config.from_flat(settings).to_toml())
    return folder


def greedy_answer(run: Path, prompt: str, number: int) -> str:
    """Decode greedily by hand: the whole text through stock PEFT for each new token."""
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(run / "adapter"), None
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().config.name_or_path)
    ids = tokenizer.convert_tokens_to_ids(["<s>", "user", *prompt.split(), "</s>", "assistant"])
    answer: list[int] = []
    while len(answer) < number and tokenizer.eos_token_id not in answer:
        with torch.inference_mode():
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_prompts_from_option_and_standard_input_get_the_likeliest_answers(run: Path) -> None:
    expected = [greedy_answer(run, prompt, 12) for prompt in PROMPTS]
    assert expected[0] != expected[1] and len(expected[0].split()) > 3
    output = run_command("chat", run, "--prompt", PROMPTS[0], "--max-tokens", 12)
    assert output.out.strip() == expected[0]
    output = run_command("chat", run, "--max-tokens", 12, stdin=f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    assert [line.strip() for line in output.out.replace("> ", "").splitlines() if line.strip()] == expected


def test_the_merged_model_gives_the_same_answers_in_a_pipeline(run: Path, tmp_path: Path) -> None:
    run_command("export", run, "--merge", "--to", tmp_path / "merged")
    generate = pipeline("text-generation", str(tmp_path / "merged"))
    answer = generate([{"role": "user", "content": PROMPTS[0]}], max_new_tokens=12, do_sample=False)
    assert answer[0]["generated_text"][-1]["content"].strip() == greedy_answer(run, PROMPTS[0], 12)


def test_sampled_answers_follow_the_seed(run: Path) -> None:
    first, repeated, with_another_seed = (
        run_command("chat", run, "--prompt", PROMPTS[0], "--temperature", 1.5, "--seed", seed).out for seed in (1, 1, 2)
    )
    assert first == repeated != with_another_seed


def test_a_folder_without_a_finished_language_model_is_rejected(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert "has no adapter: the run has not finished" in run_command("chat", tmp_path, code=2).message
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    description = json.loads((adapter / "task.json").read_text())
    (adapter / "task.json").write_text(json.dumps(description | {"task": "text-classification"}))
    assert "has task = 'text-classification', but chat needs" in run_command("chat", tmp_path, code=2).message


def test_an_adapter_folder_answers_with_its_base_in_another_place(run: Path, tiny_llama: str, tmp_path: Path) -> None:
    """An adapter without prompts in training continues the text itself: there is no turn of the user."""
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    description = json.loads((adapter / "task.json").read_text())
    description["base"]["name"] = str(tmp_path / "nowhere")
    (adapter / "task.json").write_text(json.dumps(description))
    arguments = ("chat", adapter, "--prompt", PROMPTS[0], "--max-tokens", 12, "--device", "cpu")
    assert "Set base to the folder with the model" in run_command(*arguments, code=2).message
    assert run_command(*arguments, "--base", tiny_llama).out.strip() == greedy_answer(run, PROMPTS[0], 12)
    description["data"]["prompt-column"] = ""
    (adapter / "task.json").write_text(json.dumps(description))
    continued = run_command(*arguments, "--base", tiny_llama).out.strip()
    assert continued != greedy_answer(run, PROMPTS[0], 12) and continued
