"""`copra-fl chat`: talk to the language model of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from copra_fl.cli.options import BaseOption, DeviceName, DeviceOption, ModelArgument
from copra_fl.config import ConfigError

if TYPE_CHECKING:
    from copra_fl.models.export import SavedModel

TASK = "causal-lm"


def chat(
    run: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Answer this prompt and exit. Default: read prompts from standard input."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    device: DeviceOption = DeviceName.AUTO,
    base: BaseOption = "",
) -> None:
    """Answer prompts with the language model of a run; a model trained on plain texts continues each line.

    Each prompt is answered by itself, as in training: the model does not see earlier prompts.
    """
    from copra_fl import startup

    startup.prepare()
    from copra_fl.models.export import load, read_description
    from copra_fl.models.release import adapter_folder, data_settings
    from copra_fl.seeding import torch_stream
    from copra_fl.tasks.causal_lm import beginning, opening

    adapter = adapter_folder(run)
    if (task := read_description(adapter)["task"]) != TASK:
        raise ConfigError(f"{run} has task = {task!r}, but chat needs a model with task = {TASK!r}")
    saved = load(adapter, device, base)
    has_prompts = bool(data_settings(saved, adapter).prompt_column)
    for number, line in enumerate(_lines() if prompt is None else [prompt]):
        text = opening(saved.processor, line) if has_prompts else beginning(saved.processor) + line
        with torch_stream(saved.model.device, seed, "chat", number):
            stream(saved, text, temperature, max_tokens)


def stream(saved: SavedModel, text: str, temperature: float, max_tokens: int) -> None:
    """Print the model's continuation of `text`, token by token."""
    from transformers import TextStreamer

    tokenizer = saved.processor
    inputs = tokenizer(text, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    saved.model.peft.generate(
        **inputs.to(saved.model.device),
        **sampling,
        max_new_tokens=max_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
