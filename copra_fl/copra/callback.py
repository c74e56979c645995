"""CopRA in anyone's own training: a callback for Transformers' Trainer.

A Trainer run is trained as the only client of a federation of one round: the same masks from the same
random streams, with progress t = steps done / all steps. An adapter that is off is not computed and does not move
(`copra_fl.copra.gates`).
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copra_fl.adapters.state import part_of
from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.copra import schedule
from copra_fl.copra.gates import Gates


class CopraCallback(TrainerCallback):
    """Trains the LoRA adapters of Trainer's model with CopRA (arXiv 2410.22911).

    In each optimiser step every group of adapters is on with a probability that rises from `p0` to 1 over the
    share `ramp` of the training. All micro-batches of a step share its mask. After each step all adapters are on
    again, so that evaluation, callbacks and what comes after the training see the whole model. Whatever else the
    model trains, such as a task head, is always trained.

    Masks depend on seed, step and number of steps alone: a resumed training goes on with the same ones, and neither
    the order of the data nor dropout is shifted. With ``p0=1`` the training is bitwise the one without the callback.

    Two things that a callback cannot see. A training that an exception ends in the middle of a step leaves adapters
    off until the next ``train()``: before evaluating, call ``model.base_model.enable_adapter_layers()``. And a loss
    that itself switches adapters off and on again (DPO with the base as its reference) undoes the mask.

    Args:
        p0: probability that a group is on at the start.
        ramp: share of the training after which every group is on.
        min_active: groups that are on at least, 0 or 1. A model that trains nothing but adapters needs 1.
        gate_group: what is switched as one: the adapters of a ``"layer"``, or of a ``"module"``.
        seed: of the masks.
        rescale: divide what is on by its probability.

    Raises ConfigError for values out of range. When the training begins, so it does for a model without LoRA layers,
    with adapters that are switched off, or with steps in which there would be nothing to train.
    """

    def __init__(
        self,
        p0: float = 0.0,
        ramp: float = 0.75,
        min_active: int = 0,
        gate_group: str = "layer",
        seed: int = 0,
        rescale: bool = False,
    ) -> None:
        settings = {
            "p0": p0,
            "ramp": ramp,
            "min-active": min_active,
            "gate-group": gate_group,
            "seed": seed,
            "rescale": rescale,
        }
        config = Config.from_flat(settings)
        self._copra, self._seed = config.copra, config.federation.seed
        self._gates = Gates(nn.Module(), gate_group)  # none, until there is a model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the gates of the model, and draw the masks of all steps."""
        self._gates.open()  # the training before may have been interrupted in the middle of a step
        self._gates = _find_gates(kwargs["model"], self._copra)
        self._masks, probabilities = schedule.client_masks(
            self._copra, self._seed, 0, state.max_steps, len(self._gates.names), server_round=1, num_rounds=1
        )
        self._scales = schedule.scales(self._copra, self._masks, probabilities)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step: its mask."""
        self._gates.set(self._masks[state.global_step], self._scales[state.global_step])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the update: all on, before Trainer counts the step, evaluates and saves."""
        self._gates.open()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All on, also if a callback stopped the training between two micro-batches."""
        self._gates.open()


def _find_gates(model: nn.Module, copra: CopraConfig) -> Gates:
    """The gates of `model`, open. Raises ConfigError where CopRA cannot train it."""
    gates = Gates(model, copra.gate_group)
    if not gates.names:
        raise ConfigError("CopraCallback: the model has no LoRA layers; give Trainer peft.get_peft_model(model, ...)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    closed = [name for name, module in layers.items() if module.disable_adapters]
    if closed:
        raise ConfigError(
            f"CopraCallback: adapters are off when the training begins ({closed[0]}, {len(closed)} in all), so that "
            "the optimizer does not have them; call model.base_model.enable_adapter_layers() before making the Trainer"
        )
    parameters = dict(model.named_parameters())
    others = any(p.requires_grad for name, p in parameters.items() if part_of(name) == "head")
    if copra.p0 < 1 and not copra.min_active and not others:
        raise ConfigError(
            "CopraCallback: the model trains nothing but adapters, and with min_active = 0 all of them can be off "
            "in a step, which then has no gradient; use min_active = 1"
        )
    gates.frozen = [p for name, p in parameters.items() if part_of(name) != "head" and not p.requires_grad]
    return gates
