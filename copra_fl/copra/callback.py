"""CopRA in any Trainer of Transformers, as a callback.

A Trainer run equals the training of the only client in a federation of one round: the same masks from the same random
streams, with progress t = steps done / all steps. An adapter that is off is not computed and does not move
(`copra_fl.copra.gates`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copra_fl.adapters.state import part_of
from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.copra import schedule
from copra_fl.copra.gates import Gates


class GateCallback(TrainerCallback):
    """Set the gates of each optimizer step, and open them after it.

    Subclasses set `_masks` and `_scales`, and `_remedy`: the advice in the error for a loss that undoes the gates.
    """

    _remedy: str
    _gates: Gates
    _masks: np.ndarray
    _scales: np.ndarray

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the mask of the step, before its first micro-batch."""
        self._gates.set(self._masks[state.global_step], self._scales[state.global_step])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ConfigError if the mask does not hold any more."""
        if not self._gates.holds():
            raise ConfigError(
                "the loss of the Trainer switches adapters on and off itself, to compare the model with its base, and "
                f"so undoes the gates of CopRA; {self._remedy}"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch all adapters on after the update, before the Trainer counts the step, evaluates and saves."""
        self._gates.open()


class CopraCallback(GateCallback):
    """Train the LoRA adapters of the Trainer's model with CopRA (arXiv 2410.22911).

    In each optimizer step every group of adapters is on with a probability that rises from `p0` to 1 over the fraction
    `ramp` of the training. All micro-batches of a step share its mask. After each step all adapters are on again, so
    evaluation, other callbacks and everything after the training use the whole model. Other trainable parts of the
    model, such as a task head, are trained in every step.

    Masks depend only on seed, step and number of steps: a resumed training continues with the same masks, and neither
    the order of the data nor dropout changes. With ``p0=1`` the training is bitwise the same as without the callback.

    If an exception ends the training in the middle of a step, some adapters stay off until the next ``train()``; call
    ``model.base_model.enable_adapter_layers()`` before you evaluate.

    Args:
        p0: probability that a group is on at the start.
        ramp: fraction of the training after which every group is on.
        min_active: minimum number of active groups, 0 or 1. A model that trains only adapters needs 1.
        gate_group: unit of a gate: the adapters of a ``"layer"`` or of a ``"module"``.
        seed: random seed of the masks.
        rescale: divide the output of active adapters by their probability.

    Raises:
        ConfigError: for values out of range; when the training begins, for a model without LoRA layers, with
            adapters that are switched off, or with steps in which nothing would be trained; and in the training, for a
            loss that itself switches adapters off and on again (DPO with the base as its reference).
    """

    _remedy = "leave CopraCallback out, or give the loss a reference adapter"

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
            "local-training": "copra",
            "p0": p0,
            "ramp": ramp,
            "min-active": min_active,
            "gate-group": gate_group,
            "seed": seed,
            "rescale": rescale,
        }
        config = Config.from_flat(settings)
        self._copra, self._seed = config.copra, config.federation.seed
        self._gates = Gates(nn.Module(), gate_group)  # without gates until the training begins

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the gates of the model, and draw the masks of all steps."""
        self._gates.open()  # an earlier training may have been interrupted in the middle of a step
        self._gates = _find_gates(kwargs["model"], self._copra)
        self._masks, probabilities = schedule.client_masks(
            self._copra, self._seed, 0, state.max_steps, len(self._gates.names), server_round=1, num_rounds=1
        )
        self._scales = schedule.scales(self._copra, self._masks, probabilities)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch all adapters on, also if a callback stopped the training between two micro-batches."""
        self._gates.open()


def _find_gates(model: nn.Module, copra: CopraConfig) -> Gates:
    """Return the gates of `model`, open. Raises ConfigError if CopRA cannot train the model."""
    gates = Gates(model, copra.gate_group)
    if not gates.names:
        raise ConfigError("CopraCallback: the model has no LoRA layers; give Trainer peft.get_peft_model(model, ...)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    disabled = [name for name, module in layers.items() if module.disable_adapters]
    if disabled:
        raise ConfigError(
            f"CopraCallback: {len(disabled)} adapters are off when the training begins (first: {disabled[0]}), so the "
            "optimizer does not train them; call model.base_model.enable_adapter_layers() before you make the Trainer"
        )
    if copra.rescale and any(True in module.use_dora.values() for module in layers.values()):
        raise ConfigError(
            "CopraCallback: rescale = True scales the product B A, which is not the whole change of a DoRA layer; use "
            "rescale = False"
        )
    parameters = dict(model.named_parameters())
    trains_head = any(p.requires_grad for name, p in parameters.items() if part_of(name) == "head")
    if copra.p0 < 1 and not copra.min_active and not trains_head:
        raise ConfigError(
            "CopraCallback: the model trains only adapters, and with min_active = 0 all of them can be off in a step, "
            "which then has no gradient; use min_active = 1"
        )
    gates.freeze(p for name, p in parameters.items() if part_of(name) != "head" and not p.requires_grad)
    return gates
