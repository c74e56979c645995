"""CopraCallback in Transformers' Trainer: equal to our own training, and at p = 1 to a Trainer without it."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext
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

import copra_fl
from copra_fl import CopraCallback
from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.copra import schedule
from copra_fl.data.federated import load_data
from copra_fl.models import adapted
from copra_fl.models.build import build_model, load_processor
from copra_fl.models.export import load
from copra_fl.training.batches import plan_steps
from copra_fl.training.plan import Plan, Start
from copra_fl.training.single import train_client
from tests.support.documents import blocks
from tests.support.tiny import NUM_LAYERS, Settings

STEPS = 6
MASKS = schedule.client_masks(CopraConfig("copra", p0=0.3), 3, 0, STEPS, NUM_LAYERS, 1, 1)[0]


def make_callback() -> CopraCallback:
    """Return a callback with the masks `MASKS`."""
    return CopraCallback(p0=0.3, seed=3)


def test_the_masks_of_these_tests_switch_every_layer_and_have_a_step_without_adapters() -> None:
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
    """Our model in Trainer's form: it returns the loss, and has no dropout in training mode."""

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
def test_a_trainer_run_equals_a_federation_of_one_client_and_one_round(
    tiny: Settings, tmp_path: Path, copra: dict[str, Any]
) -> None:
    one_client = {"num-clients": 1, "num-rounds": 1, "partitioner": "iid", "seed": 1}
    steps = {"local-steps": STEPS, "gradient-accumulation": 2}
    config = Config.from_flat(tiny | one_client | steps).changed(**copra)
    federated = load_data(config, load_processor(config.model))
    model = build_model(config.model, config.copra.gate_group, 3, seed=0)
    plan = Plan(1, (0,), config)
    update = train_client(model, federated, plan, 0, Start(model.read_adapter()))

    batches = plan_steps(plan, federated, 0, len(model.gates.names)).batches
    order = np.concatenate([batch for step in batches for batch in step])
    trainer_model = build_model(config.model, config.copra.gate_group, 3, seed=0)
    trainer = Trainer(
        WithLoss(trainer_model),
        arguments(tmp_path),
        data_collator=lambda indices: federated.examples.batch(np.array(indices)),
        train_dataset=order.tolist(),
        callbacks=[CopraCallback(seed=1, **copra)],
    )
    trainer.train()
    trained = trainer_model.read_adapter()
    start = build_model(config.model, config.copra.gate_group, 3, seed=0).read_adapter()
    assert update.adapter.keys() >= {"head.weight", "head.bias"}
    for name, tensor in trained.items():
        assert torch.allclose(tensor, update.adapter.get(name, start[name]), atol=1e-6), name
    assert {name for name in trained if not torch.equal(trained[name], start[name])} == update.adapter.keys()


@pytest.fixture
def examples() -> list[dict[str, Tensor]]:
    """Random tokens for twelve steps."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 41, (96, 10), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in tokens]


def peft_model(tiny_model: str, dropout: float = 0.0, **lora: Any) -> PeftModel:
    """Return a model of Transformers and PEFT alone; the same in each call."""
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


def test_with_p0_1_the_training_is_bitwise_that_without_the_callback(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    plain, gated = peft_model(tiny_model, dropout=0.1), peft_model(tiny_model, dropout=0.1)
    for model, callbacks in ((plain, []), (gated, [CopraCallback(p0=1.0)])):
        Trainer(model, arguments(tmp_path), train_dataset=examples, callbacks=callbacks).train()
    assert_bitwise(gated, plain)


class Spy(TrainerCallback):
    """Checks at each optimizer step that exactly the active layers have gradients and move; counts micro-batches."""

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
        assert steps == [[count] * 4 for count in np.sum(self.masks, axis=0)], (
            "moments must move where the adapter does"
        )


def test_one_mask_per_optimizer_step_and_no_gradient_or_update_for_inactive_layers(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    spy = Spy()
    settings = arguments(tmp_path, weight_decay=0.1)
    Trainer(peft_model(tiny_model), settings, train_dataset=examples, callbacks=[make_callback(), spy]).train()
    assert spy.masks == MASKS.tolist()
    assert spy.forwards == np.repeat(MASKS, 2, axis=0).tolist(), "two micro-batches per step"


def test_evaluation_between_steps_uses_every_adapter_and_changes_nothing(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    expected = []

    class Forward(TrainerCallback):
        """Compute the same loss with a model without gates."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ungated = peft_model(tiny_model).eval()
            ungated.load_state_dict(kwargs["model"].state_dict())
            batch = {name: torch.stack([example[name] for example in examples[:8]]) for name in examples[0]}
            with torch.no_grad():
                expected.append(float(ungated(**batch).loss))

    settings = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    evaluated, plain = peft_model(tiny_model), peft_model(tiny_model)
    callbacks = [make_callback(), Forward()]
    trainer = Trainer(evaluated, settings, train_dataset=examples, eval_dataset=examples[:8], callbacks=callbacks)
    with torch.random.fork_rng():  # `Forward` draws from the global generator
        trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == pytest.approx(expected, abs=1e-6) and len(losses) == STEPS
    Trainer(plain, arguments(tmp_path), train_dataset=examples, callbacks=[make_callback()]).train()
    assert_bitwise(evaluated, plain)


class Stop(TrainerCallback):
    """Interrupts between the micro-batches of step 4, in which one layer is off."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same_trainer", [True, False])
def test_an_interrupted_training_continues_bitwise(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]], same_trainer: bool
) -> None:
    """Dropout is on everywhere, so its random streams must continue too."""
    assert not MASKS[3].all()
    uninterrupted = peft_model(tiny_model, dropout=0.1)
    Trainer(
        uninterrupted, arguments(tmp_path / "uninterrupted"), train_dataset=examples, callbacks=[make_callback()]
    ).train()

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
    assert_bitwise(model, uninterrupted)


def test_frozen_factors_and_user_scales_stay(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    """PEFT gives a gradient to all that is switched on; A is frozen here as in FFA-LoRA."""
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


def test_a_model_without_a_head_needs_min_active_1(tiny_model: str, tmp_path: Path) -> None:
    model = get_peft_model(
        BertForMaskedLM.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["query", "value"])
    )
    tokens = torch.randint(5, 41, (48, 10), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": row, "labels": row} for row in tokens]
    with pytest.raises(ConfigError, match="use min_active = 1"):
        Trainer(model, arguments(tmp_path), train_dataset=texts, callbacks=[CopraCallback()]).train()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=texts, callbacks=[CopraCallback(min_active=1)])
    assert np.isfinite(trainer.train().training_loss)


class WithReference(Trainer):
    """Compares the model with its base in each loss, as DPO does without a reference adapter."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_that_switches_adapters_itself_is_refused(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    """With p0 = 1 nothing is off, so it is taken."""
    for p0 in (1.0, 0.3):
        callback = CopraCallback(p0=p0, seed=3)
        trainer = WithReference(
            peft_model(tiny_model), arguments(tmp_path), train_dataset=examples, callbacks=[callback]
        )
        refused = pytest.raises(ConfigError, match="the loss of the Trainer switches .* leave CopraCallback out")
        with nullcontext() if p0 == 1 else refused:
            trainer.train()


def test_errors_name_the_value_and_the_remedy(
    tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]
) -> None:
    with pytest.raises(ConfigError, match="p0 = 2.0 must be at least 0 and at most 1\nramp = 0.0 must be more than 0"):
        CopraCallback(p0=2.0, ramp=0.0)

    def train(model: nn.Module) -> None:
        Trainer(model, arguments(tmp_path), train_dataset=examples, callbacks=[CopraCallback()]).train()

    with pytest.raises(ConfigError, match="no LoRA layers; give Trainer peft.get_peft_model"):
        train(BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3))
    dora = get_peft_model(
        BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3),
        LoraConfig(r=2, target_modules=["query"], use_dora=True),
    )
    with pytest.raises(ConfigError, match="not the whole change of a DoRA layer; use rescale = False"):
        Trainer(dora, arguments(tmp_path), train_dataset=examples, callbacks=[CopraCallback(rescale=True)]).train()
    model = peft_model(tiny_model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="enable_adapter_layers"):
        train(model)


def test_the_snippet_of_the_guide(tiny_model: str, tmp_path: Path, examples: list[dict[str, Tensor]]) -> None:
    (snippet,) = blocks("docs/how-to/trainer.md", "python")
    names = {"Trainer": Trainer, "model": peft_model(tiny_model), "args": arguments(tmp_path), "examples": examples}
    exec(snippet, names)
    assert names["trainer"].state.global_step == STEPS


def test_the_package_exports_its_public_names() -> None:
    exported = {name: getattr(copra_fl, name) for name in copra_fl.__all__}
    assert exported.items() >= {"Config": Config, "CopraCallback": CopraCallback, "load": load}.items()
    assert all(value.__name__ == name and value.__doc__ for name, value in exported.items())
    with pytest.raises(AttributeError, match="module 'copra_fl' has no attribute 'Copra'"):
        copra_fl.Copra  # noqa: B018


def test_import_copra_fl_imports_nothing_large() -> None:
    code = "import sys, copra_fl; print({'torch', 'transformers', 'peft'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
