"""Local training: the clients of a cohort, each from the global adapter, give updates.

One optimiser step of CopRA at progress t: draw a mask, switch the layers, minimise the
loss over what is on. The mask holds for all micro-batches of the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from copra_fl import schedule
from copra_fl.adapter import Adapter, Update, difference, norm, trained
from copra_fl.config import Config, TrainingConfig
from copra_fl.data import FederatedData
from copra_fl.models import Classifier
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


def num_steps(training: TrainingConfig, num_examples: int) -> int:
    """Optimiser steps of one client in one round."""
    if training.local_epochs == 0:
        return training.local_steps
    per_step = training.batch_size * training.gradient_accumulation
    return -(-num_examples * training.local_epochs // per_step)


def num_trained(training: TrainingConfig, num_examples: int) -> int:
    """Examples that one client trains on in one round, each pass counted: its expected work.

    With local-steps every batch is full, also of a client with fewer examples than a batch.
    """
    per_step = training.batch_size * training.gradient_accumulation
    return num_examples * training.local_epochs or training.local_steps * per_step


def data_order(indices: np.ndarray, training: TrainingConfig, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """The micro-batches of each optimiser step: arrays of example indices.

    Examples come in shuffled passes, one after the other. With local-epochs the last
    step is short; with local-steps every batch is full and passes run into each other.
    """
    per_step = training.batch_size * training.gradient_accumulation
    total = num_trained(training, len(indices))
    passes = [rng.permutation(indices) for _ in range(-(-total // len(indices)))]
    order = np.concatenate(passes)[:total]
    for start in range(0, total, per_step):
        step = order[start : start + per_step]
        yield [step[i : i + training.batch_size] for i in range(0, len(step), training.batch_size)]


def learning_rate_factor(training: TrainingConfig, t: float) -> float:
    """What the learning rates are multiplied by at progress `t` of the federation."""
    return 0.5 * (1 + np.cos(np.pi * t)) if training.lr_schedule == "cosine" else 1.0


def make_optimizer(model: Classifier, training: TrainingConfig) -> torch.optim.Optimizer:
    """A fresh optimiser: clients start each round without momentum, as in FedAvg."""
    groups = [
        {"params": model.parameters_of("adapter"), "lr": training.learning_rate},
        {"params": model.parameters_of("head"), "lr": training.head_learning_rate},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay)


def train_client(model: Classifier, data: FederatedData, plan: Plan, client: int, global_adapter: Adapter) -> Update:
    """Train one client for one round, from `global_adapter`, on its own data and random streams."""
    started = time.perf_counter()
    config, seed = plan.config, plan.config.federation.seed
    training, rounds = config.training, config.federation.num_rounds
    indices = data.train[client]
    steps = num_steps(training, len(indices))
    masks, probabilities = schedule.client_masks(
        config.copra, seed, client, steps, len(model.gates.names), plan.server_round, rounds
    )
    model.write_adapter(global_adapter)
    model.train_adapters(True)
    optimizer = make_optimizer(model, training)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = generator(seed, "order", plan.server_round, client)
    losses = []
    for step, micro_batches in enumerate(data_order(indices, training, order)):
        factor = learning_rate_factor(training, (plan.server_round - 1 + step / steps) / rounds)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        scale = 1.0
        if config.copra.rescale and masks[step].any():
            scale = 1.0 / schedule.inclusion(probabilities[step], masks.shape[1], config.copra.min_active)
        model.gates.set(masks[step], scale)
        with torch_stream(model.device, seed, "dropout", plan.server_round, client, step):
            losses.append(_accumulate_gradients(model, data, micro_batches))
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    active_steps = tuple(int(count) for count in masks.sum(0))
    adapter = trained(model.read_adapter(), active_steps, model.group_of)
    metrics = {
        "loss": float(torch.stack(losses).mean()),
        "steps": float(steps),
        "seconds": time.perf_counter() - started,
        "distance": norm(difference(adapter, global_adapter)),
    }
    return Update(client, adapter, len(indices), active_steps, metrics)


def _accumulate_gradients(model: Classifier, data: FederatedData, micro_batches: list[np.ndarray]) -> torch.Tensor:
    """Gradients of the mean loss over all micro-batches, as if they were one batch; returns that loss."""
    num_examples = sum(map(len, micro_batches))
    loss = torch.zeros((), device=model.device)
    for indices in micro_batches:
        batch = data.examples.batch(indices, model.device)
        logits = model(batch["input_ids"], batch["attention_mask"])
        part = F.cross_entropy(logits, batch["labels"], reduction="sum") / num_examples
        part.backward()
        loss += part.detach()
    return loss
