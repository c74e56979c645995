"""`copra-fl chat`, with a run of the tiny Llama."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from copra_fl.cli import main
from copra_fl.config import Config
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings

Chat = Callable[..., str]

PROMPTS = ("sea1 sky2 sand3", "sky4")


@pytest.fixture(scope="module")
def run(tiny: Settings, tiny_llama: str, texts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose labels are prompts."""
    model = {"task": "causal-lm", "model": tiny_llama, "target-modules": "all-linear", "prompt-column": "label"}
    settings = tiny | model | {"partitioner": "iid", "num-rounds": 1, "learning-rate": 0.05, "local-training": "lora"}
    folder = run_federation(settings, tmp_path_factory.mktemp("chat") / "run")
    (folder / "config.toml").write_text(Config.from_flat(settings).to_toml())
    return folder


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """What the command prints, called as the console script calls it; `typed` is at its standard input."""

    def call(*arguments: object, typed: str = "", code: int | None = 0) -> str:
        monkeypatch.setattr("sys.argv", ["copra-fl", "chat", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert (caught.value.code or 0) == code, printed.err
        return printed.err if code else printed.out

    return call


def likeliest(run: Path, prompt: str, number: int) -> str:
    """Greedy by hand: the whole text through stock PEFT for each new token."""
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(run / "adapter"), None
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().config.name_or_path)
    ids = tokenizer.convert_tokens_to_ids(["<s>", "user", *prompt.split(), "</s>", "assistant"])
    found: list[int] = []
    while len(found) < number and tokenizer.eos_token_id not in found:
        with torch.inference_mode():
            found.append(int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax()))
    return tokenizer.decode(found, skip_special_tokens=True)


def test_one_prompt_and_typed_lines_get_the_likeliest_answers(run: Path, chat: Chat) -> None:
    expected = [likeliest(run, prompt, 12) for prompt in PROMPTS]
    assert expected[0] != expected[1] and len(expected[0].split()) > 3
    assert chat(run, "--prompt", PROMPTS[0], "--max-tokens", 12).strip() == expected[0]
    typed = chat(run, "--max-tokens", 12, typed=f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    assert [line.strip() for line in typed.replace("> ", "").splitlines() if line.strip()] == expected


def test_drawn_answers_follow_the_seed(run: Path, chat: Chat) -> None:
    first, again, other = (
        chat(run, "--prompt", PROMPTS[0], "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_cannot_be_chatted_with_is_refused(run: Path, chat: Chat, tmp_path: Path) -> None:
    assert "cannot read" in chat(tmp_path, code=2)
    config = Config.from_toml(run / "config.toml")
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert "has no adapter: it has not finished" in chat(tmp_path, code=2)
    (tmp_path / "config.toml").write_text(Config().to_toml())
    assert "is a run of task = 'text-classification'" in chat(tmp_path, code=2)
