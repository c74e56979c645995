"""``engine = "trainer"``: each client trains with the Trainer of Transformers or TRL that its script makes.

    round   global adapter ──> Trainer's PEFT model ── local-steps steps of Trainer.train() ──> update

The federation decides: the number of steps, the parts that the rule trains, the gates of CopRA, and all random streams.
The Trainer decides the rest: loss, data collator, batches, optimizer, learning rate and its schedule, which spans all
rounds. Each round begins with a new optimizer.

The model of the configuration and the Trainer's must be the same base with adapters of the same names, shapes and
scaling (`check_trainer`), because the server aggregates and evaluates the former. What the Trainer alone sees may
differ: dropout, gradient checkpointing, mixed precision, NEFTune, further frozen adapters.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from copra_fl.adapters.state import Adapter, Update, difference, norm, parts, trained
from copra_fl.config import Config, ConfigError
from copra_fl.copra.callback import GateCallback
from copra_fl.copra.gates import Gates
from copra_fl.data.federated import FederatedData
from copra_fl.models.adapted import AdaptedModel, lora_layers
from copra_fl.models.build import build_model
from copra_fl.seeding import derive, global_stream
from copra_fl.training.batches import draw_masks
from copra_fl.training.plan import Plan, Start, num_steps
from copra_fl.training.script import run_script
from copra_fl.wording import join_words

#: callbacks that print, report to trackers, or need evaluations, which the server makes
LEFT_OUT = (ProgressCallback, PrinterCallback, EarlyStoppingCallback, *INTEGRATION_TO_CALLBACK.values())
#: seeds of Trainer's samplers are below this
NUM_SEEDS = 2**32


class ScriptedClient:
    """A client's Trainer, and the model in it.

    Attributes:
        trainer: the Trainer that the script has made.
        model: its PEFT model, with gates and adapter tensors under the names of the federation.
        folder: the folder of the script, in which it trains, as it would alone.
    """

    def __init__(self, trainer: Trainer, reference: AdaptedModel, config: Config) -> None:
        check_trainer(trainer, reference, config)
        peft: Any = trainer.model
        self.trainer = trainer
        self.folder = Path(config.training.script).expanduser().absolute().parent
        group, pooling = config.copra.gate_group, config.model.pooling
        self.model = AdaptedModel(reference.task, peft, None, pooling, group, trainer.args.device)
        handler = trainer.callback_handler
        handler.callbacks = [callback for callback in handler.callbacks if not isinstance(callback, LEFT_OUT)]
        _keep_quiet(trainer.args)


def _keep_quiet(args: Any) -> None:
    """Let the Trainer write, evaluate, report and push nothing."""
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end = args.push_to_hub = args.eval_on_start = False
    args.logging_nan_inf_filter = False  # a loss that is not finite must show
    args.disable_tqdm = True


def open_client(data: FederatedData, config: Config, client: int, reference: AdaptedModel) -> ScriptedClient:
    """Run the script for `client`. Raises ConfigError as `run_script` and `check_trainer` do.

    What the script draws at random depends on the run's seed and the client alone.
    """
    assert data.read_rows is not None
    rows = data.read_rows().iloc[data.train[client]]
    with global_stream(config.federation.seed, "script", client):
        trainer = run_script(config.training.script, rows, shared=config.data.partitioner != "own")
        return ScriptedClient(trainer, reference, config)


def check_script(data: FederatedData, config: Config) -> None:
    """Run the script for one client. Raises ConfigError as `open_client` does, and for an error of the script."""
    client = next(client for client, indices in enumerate(data.train) if len(indices))
    group, seed = config.copra.gate_group, config.federation.seed
    reference = build_model(config.model, group, len(data.label_names), seed)
    try:
        open_client(data, config, client, reference)
    except ConfigError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"script = {config.training.script!r} fails for client {client}: {type(error).__name__}: {error} (in "
            f"{Path(frame.filename).name}, line {frame.lineno})"
        ) from error


def check_trainer(trainer: Any, reference: AdaptedModel, config: Config) -> None:
    """Raise ConfigError with the reason if a federation of `config` cannot train the model of `trainer`.

    `reference` is the model of the configuration.
    """
    owner = f"the Trainer of script = {config.training.script.rpartition('/')[2]!r}"
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"{owner}: copra_fl.federate needs a transformers.Trainer, not {type(trainer).__name__}")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ConfigError(
            f"{owner} has an optimizer or schedule of its own, but each round begins with a new one; set optim and "
            "lr_scheduler_type in its arguments, or optimizer_cls_and_kwargs, in place of optimizers"
        )
    if trainer.model_init is not None:
        raise ConfigError(f"{owner} has model_init, which would replace the global adapter in each round; pass a model")
    model: Any = trainer.model
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"{owner} has a {type(model).__name__}, not a PEFT model, and a federation averages adapters; pass "
            "peft_config=LoraConfig(...), or a model of peft.get_peft_model"
        )
    if list(model.active_adapters) != ["default"]:
        raise ConfigError(
            f"{owner} trains the adapters {join_words(model.active_adapters)}, but the federation has one; call it "
            "'default', and leave the others inactive"
        )
    kind = str(getattr(model.peft_config["default"].peft_type, "value", model.peft_config["default"].peft_type))
    if kind != "LORA":
        raise ConfigError(f"{owner} has an adapter of type {kind}; aggregation rules average LoRA adapters alone")
    _check_layout(owner, model, reference, config)
    _check_base(owner, model, reference, config)


def _check_layout(owner: str, model: PeftModel, reference: AdaptedModel, config: Config) -> None:
    """Raise ConfigError unless `model` trains tensors of the names, shapes, type and scaling of `reference`."""
    expected: Mapping[str, Tensor] = reference.read_adapter()
    parameters = {name.replace(".default.", "."): tensor for name, tensor in model.named_parameters()}
    trains = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    adapted = {name.partition(".lora_")[0] for name in trains if ".lora_A." in name or ".lora_B." in name}
    modules = {name.partition(".lora_")[0] for name in expected}
    dora = any(".lora_magnitude_vector." in name for name in trains)
    if dora != config.model.dora:
        raise ConfigError(
            f"{owner} has use_dora={dora}, the configuration dora = {str(config.model.dora).lower()}; use the same in "
            f"both, for example --set dora={str(dora).lower()}"
        )
    if adapted != modules:
        more, fewer = sorted(adapted - modules), sorted(modules - adapted)
        raise ConfigError(
            f"{owner} has adapters on {len(adapted)} modules, the configuration on {len(modules)}, by target-modules = "
            f"{config.model.target_modules!r} (only in the Trainer: {', '.join(more[:3]) or 'none'}; only in the "
            f"configuration: {', '.join(fewer[:3]) or 'none'}); use the same target_modules in both"
        )
    if others := sorted(trains.keys() - expected.keys()):
        raise ConfigError(
            f"{owner} also trains {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}, which no rule averages; "
            "use no bias, lora_bias, modules_to_save or trainable_token_indices, so that it trains adapters alone"
        )
    for name, tensor in expected.items():
        other = parameters[name]
        if other.shape != tensor.shape:
            rank = min(other.shape)
            raise ConfigError(
                f"{owner} has {name} of shape {tuple(other.shape)}, the configuration {tuple(tensor.shape)} with "
                f"rank = {config.model.rank}; use the same rank in both, for example --set rank={rank}"
            )
        if other.dtype != tensor.dtype:
            raise ConfigError(
                f"{owner} has adapters in {other.dtype}, but a federation averages them in float32; leave PEFT's "
                "autocast_adapter_dtype at True, and use bf16=True for mixed precision"
            )
    scaling = {layer.scaling["default"] for layer in lora_layers(model)}
    scaling_here = config.model.scaling(config.model.rank)
    if any(abs(value - scaling_here) > 1e-6 * scaling_here for value in scaling):
        values = join_words([f"{value:g}" for value in sorted(scaling)])
        raise ConfigError(
            f"{owner} scales its adapters by {values}, the configuration by {scaling_here:g} (lora-alpha = "
            f"{config.model.lora_alpha:g}, rank = {config.model.rank}, lora-scaling = {config.model.lora_scaling!r}); "
            "use the same lora_alpha in both, and lora-scaling = 'rslora' for use_rslora=True"
        )


def _check_base(owner: str, model: PeftModel, reference: AdaptedModel, config: Config) -> None:
    """Raise ConfigError unless the frozen weights are those of `reference`, in the coarser of both types.

    Weights that either model has quantized are not compared.
    """
    for name, module in reference.linears.items():
        other: Any = model.get_submodule(f"{name}.base_layer")
        expected, given = module.weight, other.weight
        if not (expected.is_floating_point() and given.is_floating_point()):
            continue
        dtype = min(expected.dtype, given.dtype, key=lambda kind: torch.finfo(kind).bits)
        if expected.shape != given.shape or not torch.equal(
            expected.detach().to(dtype), given.detach().to(expected.device, dtype)
        ):
            raise ConfigError(
                f"{owner} has another base than model = {config.model.model!r}: the weights of {name} differ; open the "
                "same model in both"
            )


class _RoundCallback(GateCallback):
    """Set the gates of each step to the masks of a client's round."""

    _remedy = "use local-training = 'lora'"

    def __init__(self, gates: Gates, masks: np.ndarray, scales: np.ndarray) -> None:
        self._gates, self._masks, self._scales = gates, masks, scales


def train_client(
    client: int, scripted: ScriptedClient, plan: Plan, start: Start, num_examples: int, residual_of: AdaptedModel
) -> Update:
    """Train `client` for one round from `start` with its Trainer, and return its update.

    The residual on W0 is that of the model `residual_of`. Raises RuntimeError if the Trainer ends before all its steps.
    """
    started = time.perf_counter()
    trainer, model, config = scripted.trainer, scripted.model, plan.config
    steps = num_steps(config.training, num_examples)
    masks, scales, _ = draw_masks(plan, client, steps, len(model.gates.names))
    model.write_adapter(start.adapter)
    model.share_residual(residual_of)
    model.train_only(plan.trained_parts)
    seed = derive(config.federation.seed, "trainer", plan.server_round, client) % NUM_SEEDS
    trainer.args.max_steps, trainer.args.seed, trainer.args.data_seed = steps, seed, seed
    trainer.accelerator.dataloader_config.data_seed = seed
    _begin_round(trainer, (plan.server_round - 1) * steps, config.federation.num_rounds * steps)
    callback = _RoundCallback(model.gates, masks, scales)
    trainer.add_callback(callback)
    try:
        with global_stream(config.federation.seed, "trainer", plan.server_round, client), chdir(scripted.folder):
            output = trainer.train()
    finally:
        model.gates.open()
        trainer.remove_callback(callback)
        trainer.accelerator.unwrap_model(model.peft, keep_fp32_wrapper=False)  # the next round wraps it again
    if output.global_step != steps:
        raise RuntimeError(f"the Trainer of client {client} ended after {output.global_step} of {steps} steps")
    adapter = model.read_adapter()
    metrics = {
        "loss": float(output.training_loss),
        "seconds": time.perf_counter() - started,
        "distance": norm(difference(adapter, start.adapter)),
        "flops": float(trainer.state.total_flos),
        "steps": float(steps),
    }
    active_steps = tuple(masks.sum(0).tolist())
    sent: Adapter = trained(parts(adapter, plan.trained_parts), active_steps, model.group_of)
    return Update(client, sent, num_examples, active_steps, metrics)


def _begin_round(trainer: Any, done: int, total: int) -> None:
    """Give `trainer` a new optimizer, and a schedule of `total` steps of which `done` are over."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.current_flos = 0

    def create_scheduler(num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = type(trainer).create_scheduler(trainer, total, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each of these
            for _ in range(done):
                scheduler.step()
        return scheduler

    trainer.create_scheduler = create_scheduler
