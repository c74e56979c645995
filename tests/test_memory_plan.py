"""The memory plan agrees with the tensors that autograd keeps in a step of the engine, and with loaded weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import load_data
from copra_fl.models import memory_plan
from copra_fl.models.build import build_model, load_processor
from copra_fl.models.memory_plan import GB, plan
from copra_fl.training.engine import StackedEngine, open_engine
from copra_fl.training.plan import Plan, Start

BATCH_SIZE = 4


@pytest.fixture
def config(tiny: dict[str, object]) -> Config:
    """Three clients per step; every text is longer than max-length, so all rows have the same length."""
    flat = tiny | {"max-length": 8, "attention": "eager", "local-training": "lora", "local-steps": 1}
    return Config.from_flat(flat | {"step-tokens": 3 * BATCH_SIZE * 8})


def kept_in_a_step(config: Config, clients: tuple[int, ...]) -> int:
    """Return the bytes that autograd keeps in one step of `clients`, without adapters and base."""
    federated = load_data(config, load_processor(config.model))
    engine = open_engine("stacked", config.model, "layer", len(federated.label_names), seed=0)
    assert isinstance(engine, StackedEngine)
    start = engine.model.read_adapter()
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        training = Plan(config=config, server_round=1, clients=clients)
        engine.train(federated, training, clients, dict.fromkeys(clients, Start(start)), lambda done: None)
    frozen = {parameter.untyped_storage()._cdata for parameter in engine.model.parameters()}
    return sum(storage.nbytes() for number, storage in kept.items() if number not in frozen)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_activations_of_a_row_are_those_of_a_step_of_the_engine(config: Config, attention: str) -> None:
    """Three clients keep 2 x batch-size rows more than one client, and two more adapters."""
    config = config.changed(attention=attention)
    needed = plan(config, num_labels=3, tokens=config.data.max_length)
    added = kept_in_a_step(config, (0, 1, 2)) - kept_in_a_step(config, (0,))
    assert added / (2 * BATCH_SIZE * needed.row) == pytest.approx(1, abs=0.15)


def test_the_activations_of_a_language_model_include_the_log_probabilities_of_its_vocabulary(
    config: Config, tiny_llama: str, tmp_path: Path
) -> None:
    """With 2,000 words they are most of a row."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    description = LlamaConfig.from_pretrained(tiny_llama, vocab_size=2000)
    LlamaForCausalLM(description).save_pretrained(tmp_path / "base")
    flat = {"task": "causal-lm", "model": str(tmp_path / "base"), "target-modules": "q_proj,v_proj"}
    config = Config.from_flat(config.to_flat() | flat | {"partitioner": "iid"})
    row = plan(config, num_labels=0, tokens=config.data.max_length).row
    added = kept_in_a_step(config, (0, 1, 2)) - kept_in_a_step(config, (0,))
    assert added / (2 * BATCH_SIZE * row) == pytest.approx(1, abs=0.15)
    assert row > config.data.max_length * 2000 * 4


def test_with_checkpointing_a_row_keeps_the_inputs_of_blocks_and_the_block_that_is_computed_again(
    config: Config,
) -> None:
    """Three equal blocks: a third of what the engine no longer keeps is alive again while a block is recomputed."""
    checkpointed = config.changed(gradient_checkpointing=True)
    both, tokens = (config, checkpointed), config.data.max_length
    rows = [plan(one, 3, tokens).row for one in both]
    kept, inputs = ((kept_in_a_step(one, (0, 1, 2)) - kept_in_a_step(one, (0,))) / (2 * BATCH_SIZE) for one in both)
    assert rows[1] == pytest.approx(inputs + (kept - inputs) / 3, rel=0.15)
    assert rows[1] < 0.5 * rows[0]
    tiers = [plan(one.changed(client_depths="1,2,3,1,2,3"), 3, tokens).tiers for one in both]
    assert tiers[1][3] == rows[1] and tiers[1][1] == tiers[0][1], "a single block is computed again in any case"
    assert tiers[1][1] < tiers[1][2] < tiers[0][2]


def test_base_and_adapters_have_the_size_of_the_loaded_ones(config: Config) -> None:
    needed = plan(config, num_labels=3, tokens=config.data.max_length)
    model = build_model(config.model, "layer", 3, seed=0)
    adapter = sum(tensor.nbytes for tensor in model.read_adapter().values())
    assert needed.client == 4 * adapter, "values, gradients, two moments"
    base = sum(parameter.nbytes for name, parameter in model.peft.named_parameters() if ".lora_" not in name)
    assert needed.base == base
    assert (needed.clients, needed.batch_size) == (3, BATCH_SIZE)
    assert needed.total == base + 3 * (4 * adapter + BATCH_SIZE * needed.row)


@pytest.mark.parametrize("kind", ["stacked", "peft"])
def test_a_client_that_trains_few_layers_keeps_few_activations(config: Config, kind: str) -> None:
    """The plan of each depth agrees with the bytes that autograd keeps in training, in either engine."""
    config = config.changed(client_depths="1,2,3,1,2,3", engine=kind)
    data, plan_ = load_data(config, load_processor(config.model)), plan(config, 3, config.data.max_length)
    engine = open_engine(kind, config.model, "layer", 3, seed=0)
    clients = tuple(range(6))
    starts = dict.fromkeys(clients, Start(engine.model.read_adapter()))
    training = Plan(config=config, server_round=1, clients=clients)
    measured: dict[int, set[float]] = {1: set(), 2: set(), 3: set()}
    for part in engine.slices(data, training):
        for update in engine.train(data, training, part, starts, lambda done: None):
            measured[sum(steps > 0 for steps in update.active_steps)].add(update.metrics["memory"])
    for depth, row in plan_.tiers.items():
        for memory in measured[depth]:
            assert memory == pytest.approx(BATCH_SIZE * row, rel=0.2), depth
    assert max(measured[1]) < 0.45 * min(measured[3])
    assert plan_.row == plan_.tiers[3] == plan(config.changed(client_depths=""), 3, config.data.max_length).row
    assert set(plan(config.changed(depth_allocation="random"), 3, 8).tiers.values()) == {plan_.row}
    assert "a client of depth 1 0." in str(plan_)


@pytest.mark.parametrize(("attention", "squares"), [("eager", 2), ("sdpa", 1)])
def test_attention_grows_with_the_square_of_the_tokens(config: Config, attention: str, squares: int) -> None:
    """Eager attention keeps (heads, T, T) probabilities per layer in float32: 3 layers, 2 heads. sdpa keeps no
    probabilities, but a mask (T, T) per layer in a batch with padding."""
    config = config.changed(attention=attention)
    rows = [plan(config.changed(max_length=tokens), 3, tokens).row for tokens in (64, 128, 256)]
    assert rows[2] - 2 * rows[1] == pytest.approx(3 * squares * 4 * (256**2 - 2 * 128**2), rel=0.02)
    assert rows[1] - 2 * rows[0] == pytest.approx(3 * squares * 4 * (128**2 - 2 * 64**2), rel=0.02)


def test_no_more_clients_step_together_than_a_round_samples(config: Config) -> None:
    """A third of six clients, with half as many additional ones; a private round can draw all six."""
    config = config.changed(fraction_clients=1 / 3, step_tokens=6 * BATCH_SIZE * config.data.max_length)
    private = config.changed(dp_clip=1.0)
    over_sampled = config.changed(failures="tolerant", over_sample=0.5)
    assert [plan(one, 3, config.data.max_length).clients for one in (config, over_sampled, private)] == [2, 3, 6]


def test_max_memory_limits_the_clients_of_a_step(config: Config) -> None:
    needed = plan(config, 3, config.data.max_length)
    one = (needed.total - needed.base) / 3

    def fitted(clients: float) -> Config:
        limited = config.changed(max_memory_gb=(needed.base + clients * one) / GB)
        return memory_plan.limit_step_tokens(limited, needed)

    assert fitted(2.5).training.step_tokens == 2 * BATCH_SIZE * config.data.max_length
    assert plan(fitted(2.5), 3, config.data.max_length).total <= fitted(2.5).training.max_memory_gb * GB
    assert fitted(3.01).training.step_tokens == config.training.step_tokens
    with pytest.raises(ConfigError, match="too little for a single client: .* max-length, or set gradient-ch"):
        fitted(0.9)
