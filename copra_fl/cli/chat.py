"""`copra-fl chat`: try what a run has taught its language model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from copra_fl.config import Config, ConfigError

if TYPE_CHECKING:
    from copra_fl.models.export import SavedModel

TASK = "causal-lm"


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run of a language model.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this and end. Default: each line typed.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token; else drawn.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Answer lines with a run's adapter, each by itself as in training; a run of plain texts goes on from the line."""
    config = Config.from_toml(run / "config.toml")
    check(run, config)

    from copra_fl import startup

    startup.prepare()
    from copra_fl.models.export import load
    from copra_fl.seeding import torch_stream
    from copra_fl.tasks.causal_lm import beginning, opening

    saved = load(run / "adapter", config.model.device)
    for number, line in enumerate(_lines() if prompt is None else [prompt]):
        text = opening(saved.processor, line) if config.data.prompt_column else beginning(saved.processor) + line
        with torch_stream(saved.model.device, seed, "chat", number):
            stream(saved, text, temperature, max_tokens)


def check(run: Path, config: Config) -> None:
    """Raise ConfigError for a run that has nothing to chat with."""
    if config.model.task != TASK:
        raise ConfigError(f"{run} is a run of task = {config.model.task!r}; only one of {TASK!r} can be chatted with")
    if not (run / "adapter" / "task.json").exists():
        raise ConfigError(f"{run} has no adapter: it has not finished, or its rule leaves each client its own")


def stream(saved: SavedModel, text: str, temperature: float, max_tokens: int) -> None:
    """Print what the model goes on with after `text`, token by token."""
    from transformers import TextStreamer

    tokenizer = saved.processor
    inputs = tokenizer(text, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    saved.model.peft.generate(
        **inputs.to(saved.model.device),
        **drawn,
        max_new_tokens=max_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def _lines() -> Iterator[str]:
    """What is typed, until there is no more."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
