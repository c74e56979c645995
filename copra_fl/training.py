"""Local training: a client starts from an adapter and gives an update.

One optimiser step of CopRA at progress t: draw a mask, switch the layers, minimise the
loss over what is on and what the round's rule trains. The mask holds for all micro-batches of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from copra_fl import schedule
from copra_fl.adapter import Adapter, Update, difference, norm, part_of, parts, trained
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.checking import Expected
from copra_fl.aggregation.ranks import client_ranks, relative_scaling
from copra_fl.compression import FEEDBACK
from copra_fl.config import Config, TrainingConfig
from copra_fl.data import FederatedData
from copra_fl.models import AdaptedModel
from copra_fl.seeding import generator, torch_stream


@dataclass(frozen=True)
class Plan:
    """What the server tells a cohort.

    Attributes:
        server_round: the round, from 1.
        clients: the cohort.
        config: the run's configuration.
        keep: those of `clients` whose own adapters the server wants; the others' may come as one pooled update.
    """

    server_round: int
    clients: tuple[int, ...]
    config: Config
    keep: tuple[int, ...] = ()

    @property
    def trained_parts(self) -> frozenset[str]:
        """The parts (`adapter.part_of`) that clients train in this round; all else stays bit by bit."""
        return find_rule(self.config.aggregation.rule).trains(self.server_round)


def leaves_state(config: Config) -> bool:
    """Whether clients leave anything behind for their next round; they must then be trained where it lies."""
    aggregation = config.aggregation
    return find_rule(aggregation.rule).personal or aggregation.control_variates or config.federation.uplink in FEEDBACK


def num_steps(training: TrainingConfig, num_examples: int) -> int:
    """Optimiser steps of one client in one round."""
    if training.local_epochs == 0:
        return training.local_steps
    per_step = training.batch_size * training.gradient_accumulation
    return -(-num_examples * training.local_epochs // per_step)


def expected_update(config: Config, num_groups: int, num_examples: int) -> Expected:
    """What must be true of the update of a client with `num_examples` examples."""
    steps = num_steps(config.training, num_examples)
    return Expected(num_groups, num_examples, steps, config.federation.max_update_norm)


def num_trained(training: TrainingConfig, num_examples: int) -> int:
    """Examples that one client trains on in one round, each pass counted: its expected work.

    With local-steps every batch is full, also of a client with fewer examples than a batch.
    """
    per_step = training.batch_size * training.gradient_accumulation
    return num_examples * training.local_epochs or training.local_steps * per_step


def data_order(
    indices: np.ndarray,
    lengths: np.ndarray,
    training: TrainingConfig,
    rng: np.random.Generator,
    buckets: np.random.Generator,
) -> Iterator[list[np.ndarray]]:
    """The micro-batches of each optimiser step: arrays of example indices.

    Examples come in shuffled passes, one after the other. With local-epochs the last
    step is short; with local-steps every batch is full and passes run into each other.
    With bucket-batches = k, every k batches are sorted by length (`lengths`, of all examples)
    before they are cut, and come in an order drawn from `buckets`, the same for all clients.
    """
    total = num_trained(training, len(indices))
    passes = [rng.permutation(indices) for _ in range(-(-total // len(indices)))]
    order = np.concatenate(passes)[:total]
    batches = [order[start : start + training.batch_size] for start in range(0, total, training.batch_size)]
    if training.bucket_batches > 1:
        batches = _bucket(batches, lengths, training.bucket_batches, buckets)
    for start in range(0, len(batches), training.gradient_accumulation):
        yield batches[start : start + training.gradient_accumulation]


def _bucket(batches: list[np.ndarray], lengths: np.ndarray, window: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same examples in batches of like length, `window` batches at a time; a short batch stays the last."""
    bucketed: list[np.ndarray] = []
    for start in range(0, len(batches), window):
        part = batches[start : start + window]
        examples = np.concatenate(part)
        by_length = examples[np.argsort(lengths[examples], kind="stable")]
        cuts = np.split(by_length, np.cumsum([len(batch) for batch in part])[:-1])
        full = sum(len(batch) == len(part[0]) for batch in part)
        places = np.argsort(rng.random(window)[:full])
        bucketed += [cuts[place] for place in places] + cuts[full:]
    return bucketed


def make_optimizer(
    training: TrainingConfig, adapters: Iterable[Tensor], heads: Iterable[Tensor], many: bool = False
) -> torch.optim.Optimizer:
    """A fresh optimiser: clients start each round without momentum, as in FedAvg. `many`: hundreds of tensors."""
    groups, decay = [{"params": list(adapters)}, {"params": list(heads)}], training.weight_decay
    if training.optimizer == "sgd":  # torch's fused one cannot take parameters that were on at different steps
        return torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, weight_decay=decay, foreach=many)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=many)


def set_learning_rates(optimizer: torch.optim.Optimizer, training: TrainingConfig, t: float) -> None:
    """The rates of adapters and head at progress `t` of the federation."""
    factor = 0.5 * (1 + math.cos(math.pi * t)) if training.lr_schedule == "cosine" else 1.0
    for group, rate in zip(optimizer.param_groups, (training.learning_rate, training.head_learning_rate), strict=True):
        group["lr"] = rate * factor


@dataclass(frozen=True)
class LocalSteps:
    """What one client does in a round, drawn from its streams before it begins.

    Attributes:
        batches: the micro-batches of each optimiser step: arrays of example indices.
        masks: (steps, groups) bool, which gate groups are on.
        scales: (steps,) what is on is multiplied by besides the scaling of the server's rank.
        t: (steps,) progress of the federation.
    """

    client: int
    batches: list[list[np.ndarray]]
    masks: np.ndarray
    scales: np.ndarray
    t: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)


def plan_steps(plan: Plan, data: FederatedData, client: int, num_groups: int) -> LocalSteps:
    """The steps of `client` in the plan's round."""
    config, seed, server_round = plan.config, plan.config.federation.seed, plan.server_round
    copra, rounds = config.copra, config.federation.num_rounds
    indices = data.train[client]
    order, buckets = generator(seed, "order", server_round, client), generator(seed, "buckets", server_round)
    batches = list(data_order(indices, data.examples.lengths, config.training, order, buckets))
    masks, probabilities = schedule.client_masks(copra, seed, client, len(batches), num_groups, server_round, rounds)
    ranks = client_ranks(config, config.data.num_clients) if config.aggregation.client_ranks else ()
    relative = relative_scaling(config, ranks[client]) if ranks else 1.0
    scales = relative * schedule.scales(copra, masks, probabilities)
    t = (server_round - 1 + np.arange(len(batches)) / len(batches)) / rounds
    return LocalSteps(client, batches, masks, scales, t)


def make_update(
    plan: Plan,
    steps: LocalSteps,
    adapter: Adapter,
    gradients: Adapter,
    group_of: Mapping[str, int],
    num_examples: int,
    metrics: dict[str, float],
) -> Update:
    """The client's update: of its `adapter` what was trained, in gate groups that were on, and what is told of it.

    `gradients` are summed over the steps; empty where there are no control variates.
    """
    active_steps = tuple(steps.masks.sum(0).tolist())
    sent = trained(parts(adapter, plan.trained_parts), active_steps, group_of)
    steps_on = {name: active_steps[group_of[name]] if name in group_of else len(steps) for name in sent}
    mean = {name: gradients[name] / number for name, number in steps_on.items() if gradients}
    return Update(steps.client, sent, num_examples, active_steps, metrics | {"steps": float(len(steps))}, mean)


def train_client(
    model: AdaptedModel, data: FederatedData, plan: Plan, client: int, start: Adapter, correction: Adapter | None = None
) -> Update:
    """Train one client for one round, from `start`, on its own data and random streams.

    `correction` is SCAFFOLD's c - c_k. Plain PEFT, one client at a time: ``engine = "peft"``, and what
    `cohort.train_cohort` is checked against.
    """
    started = time.perf_counter()
    training, aggregation, seed = plan.config.training, plan.config.aggregation, plan.config.federation.seed
    steps = plan_steps(plan, data, client, len(model.gates.names))
    model.write_adapter(start)
    model.train_adapters(True)
    parameters = model.train_only(plan.trained_parts)
    heads = [parameter for name, parameter in parameters.items() if part_of(name) == "head"]
    adapters = [parameter for name, parameter in parameters.items() if part_of(name) != "head"]
    optimizer = make_optimizer(training, adapters, heads)
    losses, gradients = [], dict[str, Tensor]()
    for step, micro_batches in enumerate(steps.batches):
        set_learning_rates(optimizer, training, steps.t[step])
        model.gates.set(steps.masks[step], steps.scales[step])
        with torch_stream(model.device, seed, "dropout", plan.server_round, client, step):
            losses.append(_accumulate_gradients(model, data, micro_batches))
        grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        if aggregation.control_variates:
            gradients |= {name: grad + gradients.get(name, 0) for name, grad in grads.items()}
        _add_local_terms(grads, parameters, start, aggregation.proximal_mu, correction or {})
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    adapter = model.read_adapter()
    metrics = {
        "loss": float(torch.stack(losses).mean()),
        "seconds": time.perf_counter() - started,
        "distance": norm(difference(adapter, start)),
    }
    gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
    return make_update(plan, steps, adapter, gradients, model.group_of, len(data.train[client]), metrics)


def _add_local_terms(
    grads: Adapter, parameters: Mapping[str, nn.Parameter], start: Adapter, mu: float, correction: Adapter
) -> None:
    """FedProx and SCAFFOLD: g <- g + mu (theta - start) + (c - c_k)."""
    for name, grad in grads.items():
        if mu:
            grad += mu * (parameters[name].detach() - start[name].to(grad.device))
        if name in correction:
            grad += correction[name].to(grad.device)


def _accumulate_gradients(model: AdaptedModel, data: FederatedData, micro_batches: list[np.ndarray]) -> torch.Tensor:
    """Gradients of the mean loss over all targets of all micro-batches, as if they were one batch; returns that loss.

    Where nothing is on and no head is trained there are none.
    """
    num_targets = int(data.examples.num_targets[np.concatenate(micro_batches)].sum())
    loss = torch.zeros((), device=model.device)
    for indices in micro_batches:
        part = model.losses(data.examples.batch(indices, model.device)).sum() / num_targets
        if part.requires_grad:
            part.backward()
        loss += part.detach()
    return loss
