"""Local training of a cohort: its clients step together through one shared base.

Each has its own data order, masks, dropout, clipping, learning rates and number of steps, and
ends with the adapter that `training.train_client` gives it alone, up to float rounding. Adam and
SGD work element by element, so one optimiser over the stacked rows is as good as one a client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from copra_fl.adapter import Adapter, Update
from copra_fl.config import Config, TrainingConfig
from copra_fl.data import FederatedData
from copra_fl.seeding import derive
from copra_fl.stacked import StackedClassifier
from copra_fl.stacked.step import Stack, Step
from copra_fl.training import (
    LocalSteps,
    Plan,
    make_optimizer,
    make_update,
    num_steps,
    plan_steps,
    set_learning_rates,
)


def slices(config: Config, data: FederatedData, clients: Sequence[int]) -> list[tuple[int, ...]]:
    """`clients` cut into parts that train together, so that no step has more than ``step-tokens`` tokens.

    Clients with like numbers of steps go together, most steps first.
    """
    steps = {client: num_steps(config.training, len(data.train[client])) for client in clients}
    tokens = config.training.batch_size * config.data.max_length
    number = -(-len(clients) * tokens // config.training.step_tokens)
    ordered = sorted(clients, key=lambda client: (-steps[client], client))
    parts = np.array_split(np.array(ordered, dtype=int), min(number, len(clients)))
    return [tuple(int(client) for client in part) for part in parts]


def train_cohort(
    model: StackedClassifier,
    data: FederatedData,
    plan: Plan,
    clients: Sequence[int],
    global_adapter: Adapter,
    progress: Callable[[float], None] = lambda num_clients: None,
) -> list[Update]:
    """Train `clients`, all at once, for one round from `global_adapter`.

    `clients` are one of the `slices`. After each step `progress` is told how many clients' worth of work it was.
    """
    started = time.perf_counter()
    training, seed, dropout = plan.config.training, plan.config.federation.seed, plan.config.model.lora_dropout
    cohort = [plan_steps(plan, data, client, len(model.spans)) for client in clients]
    lengths = np.array([len(steps) for steps in cohort])
    start = model.layout.flatten(global_adapter).to(model.device)
    stack = Stack(model.layout, start.expand(len(cohort), -1).clone())
    optimizer = StackedOptimizer(model, stack, training, cohort)
    losses = torch.zeros(lengths.max(), len(cohort), device=model.device)
    for step in range(lengths.max()):
        rows = np.flatnonzero(lengths > step)
        on = np.stack([cohort[row].masks[step] for row in rows])
        depth = model.depth(on)
        order = np.argsort(depth, kind="stable")
        rows, on, depth = rows[order], on[order], depth[order]
        now = Step(stack, rows, on, depth, model.tensor([cohort[row].scales[step] for row in rows]))
        streams = [derive(seed, "dropout", plan.server_round, cohort[row].client, step) for row in rows if dropout]
        now.dropout = [torch.Generator(model.device).manual_seed(stream) for stream in streams]
        batches = [cohort[row].batches[step] for row in rows]
        for micro in range(max(map(len, batches))):
            losses[step, model.tensor(rows)] += _backward(model, data, now, batches, micro)
        optimizer.step(rows, on, step)
        progress(float((1 / lengths[rows]).sum()))
    seconds = (time.perf_counter() - started) / len(cohort)
    distances = torch.linalg.vector_norm(stack.values.double() - start, dim=1).tolist()
    updates = []
    for steps, values, loss, distance in zip(cohort, stack.values.cpu(), losses.cpu().T, distances, strict=True):
        metrics = {"loss": float(loss[: len(steps)].mean()), "seconds": seconds, "distance": distance}
        adapter = model.layout.unflatten(values)
        updates.append(make_update(steps, adapter, model.group_of, len(data.train[steps.client]), metrics))
    return updates


def _backward(
    model: StackedClassifier, data: FederatedData, step: Step, batches: list[list[np.ndarray]], micro: int
) -> Tensor:
    """Gradients of each client's mean loss over its micro-batch number `micro`; returns its part of the losses."""
    own = [parts[micro] if micro < len(parts) else parts[0][:0] for parts in batches]
    width = max(map(len, own))
    samples = np.stack(
        [np.concatenate([o, np.full(width - len(o), parts[0][0])]) for o, parts in zip(own, batches, strict=True)]
    )
    weights = np.stack(
        [(np.arange(width) < len(o)) / sum(map(len, parts)) for o, parts in zip(own, batches, strict=True)]
    )
    step.samples = samples.ravel()
    step.shapes = [(len(o), int(data.examples.lengths[o].max(initial=0))) for o in own]
    batch = data.examples.batch(step.samples, model.device)
    logits = model(step, batch["input_ids"], batch["attention_mask"])
    each = F.cross_entropy(logits.flatten(0, 1), batch["labels"], reduction="none").view(weights.shape)
    losses = (each * model.tensor(weights)).sum(1)
    step.stack.backward(losses.sum())
    return losses.detach().float()


class StackedOptimizer:
    """torch's own optimiser, whose parameters are each client's part of each gate group, and its head.

    A part that was off, or whose client has finished, has no gradient: value, moments and step
    count stay. Clients with as many steps share an optimiser, since rates follow progress.
    """

    def __init__(
        self, model: StackedClassifier, stack: Stack, training: TrainingConfig, cohort: Sequence[LocalSteps]
    ) -> None:
        self._training, self._grads = training, stack.grads
        spans = [*model.spans, model.head_span]
        self._parts = [[values[span] for span in spans] for values in stack.values]
        self._grad_parts = [[grads[span] for span in spans] for grads in stack.grads]
        self._groups = []
        for length in sorted({len(steps) for steps in cohort}):
            parts = [parts for parts, steps in zip(self._parts, cohort, strict=True) if len(steps) == length]
            adapters, heads = chain.from_iterable(p[:-1] for p in parts), [p[-1] for p in parts]
            t = next(steps.t for steps in cohort if len(steps) == length)
            self._groups.append((make_optimizer(training, adapters, heads, many=True), t))

    def step(self, rows: np.ndarray, on: np.ndarray, step: int) -> None:
        """One step of the clients at `rows` of the stack, where they are `on` (rows, groups); clears gradients."""
        if self._training.max_grad_norm:
            norms = torch.linalg.vector_norm(self._grads, dim=1, keepdim=True)
            self._grads.mul_((self._training.max_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        for row, open_ in zip(rows, on, strict=True):
            for part, grad, is_on in zip(self._parts[row], self._grad_parts[row], [*open_, True], strict=True):
                part.grad = grad if is_on else None
        for optimizer, t in self._groups:
            if step < len(t):
                set_learning_rates(optimizer, self._training, t[step])
                optimizer.step()
        self._grads.zero_()
