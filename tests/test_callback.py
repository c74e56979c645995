"""CopraCallback in Transformers' Trainer, against our own training, plain Trainer and itself when interrupted."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from copra_fl import CopraCallback
from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.copra import schedule
from copra_fl.data.federated import load_data
from copra_fl.models import adapted
from copra_fl.models.build import build_model, load_processor
from copra_fl.training import single
from copra_fl.training.batches import plan_steps
from copra_fl.training.plan import Plan
from tests.support.documents import blocks
from tests.support.tiny import NUM_LAYERS, Settings

STEPS = 6
MASKS = schedule.client_masks(CopraConfig(p0=0.3), 3, 0, STEPS, NUM_LAYERS, 1, 1)[0]


def make_callback() -> CopraCallback:
    """What has the masks `MASKS`."""
    return CopraCallback(p0=0.3, seed=3)


def test_the_masks_of_these_tests_have_every_layer_on_and_off_and_a_step_of_the_head_alone() -> None:
    assert MASKS.any(0).all() and not MASKS.all(0).any() and not MASKS.any(1).all()


def arguments(directory: Path, **changed: Any) -> Arguments:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Arguments(str(directory), **settings | changed)


class WithLoss(nn.Module):
    """Our model as Trainer wants a model: the loss comes out of it, and there is no dropout in train mode."""

    def __init__(self, model: adapted.AdaptedModel) -> None:
        super().__init__()
        self.model = model
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    "copra", [{"p0": 0.3}, {"min_active": 1, "gate_group": "module"}, {"rescale": True, "ramp": 0.5}], ids=str
)
def test_a_trainer_run_is_the_training_of_the_only_client_of_a_federation_of_one_round(
    tiny: Settings, tmp_path: Path, copra: dict[str, Any]
) -> None:
    alone = {"num-clients": 1, "num-rounds": 1, "partitioner": "iid", "seed": 1}
    steps = {"local-steps": STEPS, "gradient-accumulation": 2}
    config = Config.from_flat(tiny | alone | steps).changed(**copra)
    federated = load_data(config, load_processor(config.model))
    model = build_model(config.model, config.copra.gate_group, 3, seed=0)
    plan = Plan(1, (0,), config)
    update = single.train_client(model, federated, plan, 0, model.read_adapter())

    batches = plan_steps(plan, federated, 0, len(model.gates.names)).batches
    order = np.concatenate([batch for step in batches for batch in step])
    other = build_model(config.model, config.copra.gate_group, 3, seed=0)
    trainer = Trainer(
        WithLoss(other),
        arguments(tmp_path),
        data_collator=lambda indices: federated.examples.batch(np.array(indices)),
        train_dataset=order.tolist(),
        callbacks=[CopraCallback(seed=1, **copra)],
    )
    trainer.train()
    trained = other.read_adapter()
    start = build_model(config.model, config.copra.gate_group, 3, seed=0).read_adapter()
    assert update.adapter.keys() >= {"head.weight", "head.bias"}
    for name, tensor in trained.items():
        assert torch.allclose(tensor, update.adapter.get(name, start[name]), atol=1e-6), name
    assert {name for name in trained if not torch.equal(trained[name], start[name])} == update.adapter.keys()


@pytest.fixture
def examples() -> list[dict[str, Tensor]]:
    """Twelve steps' worth of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 41, (96, 10), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in tokens]


def peft_model(tiny_model: str, dropout: float = 0.0, **lora: Any) -> PeftModel:
    """Stock Transformers and PEFT; the same each time."""
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_model, num_labels=3, hidden_dropout_prob=dropout)
    config.attention_probs_dropout_prob = dropout
    base = BertForSequenceClassification.from_pretrained(tiny_model, config=config)
    settings = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"], "lora_dropout": dropout}
    return get_peft_model(base, LoraConfig(**settings | lora))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_bitwise(model: nn.Module, other: nn.Module) -> None:
    expected = trained_tensors(other)
    assert trained_tensors(model).keys() == expected.keys()
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, expected[name]), name


def test_with_p_1_throughout_it_is_trainer_without_the_callback(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    plain, gated = peft_model(tiny_model, dropout=0.1), peft_model(tiny_model, dropout=0.1)
    for model, callbacks in ((plain, []), (gated, [CopraCallback(p0=1.0)])):
        Trainer(model, arguments(tmp_path), train_dataset=examples, callbacks=callbacks).train()
    assert_bitwise(gated, plain)


class Spy(TrainerCallback):
    """Sees, at each optimiser step, who has a gradient and who moves, and how many micro-batches each mask had."""

    def __init__(self) -> None:
        self.model: Any = None
        self.masks: list[list[bool]] = []
        self.forwards: list[list[bool]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]
        self.layers = [
            [p for name, p in self.model.named_parameters() if f".layer.{layer}." in name and ".lora_" in name]
            for layer in range(NUM_LAYERS)
        ]
        self.model.register_forward_pre_hook(self._count)

    def _count(self, model: nn.Module, inputs: Any) -> None:
        if model.training:
            modules = [module for module in model.modules() if isinstance(module, LoraLayer)]
            self.forwards.append([not module.disable_adapters for module in modules[::2]])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masks.append([all(p.grad is not None for p in layer) for layer in self.layers])
        assert self.masks[-1] == [any(p.grad is not None for p in layer) for layer in self.layers]
        self._before = [[p.detach().clone() for p in layer] for layer in self.layers]
        assert all(p.grad is not None for name, p in self.model.named_parameters() if "modules_to_save" in name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer, before, on in zip(self.layers, self._before, self.masks[-1], strict=True):
            moved = [not torch.equal(p, old) for p, old in zip(layer, before, strict=True)]
            assert any(moved) == on
        steps = [[kwargs["optimizer"].state.get(p, {}).get("step", 0) for p in layer] for layer in self.layers]
        assert steps == [[count] * 4 for count in np.sum(self.masks, axis=0)], "moments move where the adapter does"


def test_one_mask_per_optimiser_step_and_what_is_off_has_no_gradient_and_no_update(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    spy = Spy()
    settings = arguments(tmp_path, weight_decay=0.1)
    Trainer(peft_model(tiny_model), settings, train_dataset=examples, callbacks=[make_callback(), spy]).train()
    assert spy.masks == MASKS.tolist()
    assert spy.forwards == np.repeat(MASKS, 2, axis=0).tolist(), "two micro-batches a step"


def test_evaluation_between_steps_sees_every_adapter_and_changes_nothing(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    expected = []

    class Forward(TrainerCallback):
        """The same loss from a model that never had a gate."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            other = peft_model(tiny_model).eval()
            other.load_state_dict(kwargs["model"].state_dict())
            batch = {name: torch.stack([example[name] for example in examples[:8]]) for name in examples[0]}
            with torch.no_grad():
                expected.append(float(other(**batch).loss))

    settings = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    evaluated, plain = peft_model(tiny_model), peft_model(tiny_model)
    callbacks = [make_callback(), Forward()]
    trainer = Trainer(evaluated, settings, train_dataset=examples, eval_dataset=examples[:8], callbacks=callbacks)
    with torch.random.fork_rng():  # what `expected` draws is not ours
        trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert seen == pytest.approx(expected, abs=1e-6) and len(seen) == STEPS
    Trainer(plain, arguments(tmp_path), train_dataset=examples, callbacks=[make_callback()]).train()
    assert_bitwise(evaluated, plain)


class Stop(TrainerCallback):
    """Ctrl-C between the micro-batches of step 4, where one layer is off."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same_trainer", [True, False])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]], same_trainer: bool
) -> None:
    """With dropout everywhere, so that its streams have to go on too."""
    assert not MASKS[3].all()
    whole = peft_model(tiny_model, dropout=0.1)
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=examples, callbacks=[make_callback()]).train()

    model, settings = peft_model(tiny_model, dropout=0.1), arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = Trainer(model, settings, train_dataset=examples, callbacks=[make_callback(), Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if not same_trainer:
        model = peft_model(tiny_model, dropout=0.1)
        trainer = Trainer(model, settings, train_dataset=examples, callbacks=[make_callback()])
    trainer.remove_callback(Stop)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert_bitwise(model, whole)


def test_a_frozen_factor_stays_frozen_and_scales_stay_the_users(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    """PEFT gives a gradient to whatever is switched on; A is frozen here as in FFA-LoRA."""
    model = peft_model(tiny_model, use_rslora=True)
    frozen = {name: p for name, p in model.named_parameters() if ".lora_A" in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scale_layer(0.5)
    before, scales = copy.deepcopy(frozen), [layer.scaling["default"] for layer in layers]
    Trainer(model, arguments(tmp_path), train_dataset=examples, callbacks=[make_callback()]).train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    assert not any(parameter.requires_grad for parameter in frozen.values())
    assert [layer.scaling["default"] for layer in layers] == scales


def test_a_model_of_adapters_alone_trains_with_one_on_at_least(tiny_model: str, tmp_path: Path) -> None:
    model = get_peft_model(
        BertForMaskedLM.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["query", "value"])
    )
    tokens = torch.randint(5, 41, (48, 10), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": row, "labels": row} for row in tokens]
    with pytest.raises(ConfigError, match="use min_active = 1"):
        Trainer(model, arguments(tmp_path), train_dataset=texts, callbacks=[CopraCallback()]).train()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=texts, callbacks=[CopraCallback(min_active=1)])
    assert np.isfinite(trainer.train().training_loss)


def test_errors_say_what_to_do(tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]) -> None:
    with pytest.raises(ConfigError, match="p0 = 2.0 must be at least 0 and at most 1\nramp = 0.0 must be more than 0"):
        CopraCallback(p0=2.0, ramp=0.0)

    def train(model: nn.Module) -> None:
        Trainer(model, arguments(tmp_path), train_dataset=examples, callbacks=[CopraCallback()]).train()

    with pytest.raises(ConfigError, match="no LoRA layers; give Trainer peft.get_peft_model"):
        train(BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3))
    model = peft_model(tiny_model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="enable_adapter_layers"):
        train(model)


def test_the_snippet_of_the_guide(tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]) -> None:
    (snippet,) = blocks("docs/how-to/trainer.md", "python")
    names = {"Trainer": Trainer, "model": peft_model(tiny_model), "args": arguments(tmp_path), "examples": examples}
    exec(snippet, names)
    assert names["trainer"].state.global_step == STEPS


def test_import_copra_fl_imports_nothing_large() -> None:
    code = "import sys, copra_fl; print({'torch', 'transformers', 'peft'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
