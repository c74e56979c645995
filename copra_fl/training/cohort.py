"""Local training of a cohort: its clients step together through one shared base.

Each has its own data order, masks, dropout, clipping, learning rates and number of steps, and
ends with the adapter that `training.train_client` gives it alone, up to float rounding. Adam and
SGD work element by element, so one optimiser over the stacked rows is as good as one a client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Update
from copra_fl.config import Config, TrainingConfig
from copra_fl.data.federated import FederatedData
from copra_fl.seeding import derive
from copra_fl.training.batches import LocalSteps, plan_steps
from copra_fl.training.optimizer import make_optimizer, set_learning_rates
from copra_fl.training.plan import Plan, num_steps
from copra_fl.training.stacked import StackedModel
from copra_fl.training.stacked.step import Stack, Step, by_client
from copra_fl.training.update import make_update


def slices(config: Config, data: FederatedData, clients: Sequence[int]) -> list[tuple[int, ...]]:
    """`clients` cut into parts that train together, so that no step has more than ``step-tokens`` tokens.

    Clients with like numbers of steps go together, most steps first.
    """
    steps = {client: num_steps(config.training, len(data.train[client])) for client in clients}
    tokens = config.training.batch_size * data.examples.max_length
    number = -(-len(clients) * tokens // config.training.step_tokens)
    ordered = sorted(clients, key=lambda client: (-steps[client], client))
    parts = np.array_split(np.array(ordered, dtype=int), min(number, len(clients)))
    return [tuple(int(client) for client in part) for part in parts]


def train_cohort(
    model: StackedModel,
    data: FederatedData,
    plan: Plan,
    clients: Sequence[int],
    starts: Mapping[int, Adapter],
    corrections: Mapping[int, Adapter],
    progress: Callable[[float], None] = lambda num_clients: None,
) -> list[Update]:
    """Train `clients`, all at once, for one round, each from its own of `starts`.

    `clients` are one of the `slices`. `corrections` are SCAFFOLD's c - c_k, where there are any. After each
    step `progress` is told how many clients' worth of work it was.
    """
    started = time.perf_counter()
    seed, dropout = plan.config.federation.seed, plan.config.model.lora_dropout
    cohort = [plan_steps(plan, data, client, model.num_groups) for client in clients]
    lengths = np.array([len(steps) for steps in cohort])
    start = _rows(model, [starts[client] for client in clients])
    stack = Stack(model.layout, start.clone(), plan.trained_parts)
    optimizer = StackedOptimizer(model, stack, plan, cohort)
    terms = LocalTerms(model, stack, plan, start, [corrections.get(client, {}) for client in clients])
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
        terms.add(rows, on)
        optimizer.step(rows, on, step)
        progress(float((1 / lengths[rows]).sum()))
    seconds = (time.perf_counter() - started) / len(cohort)
    distances = torch.linalg.vector_norm(stack.values.double() - start, dim=1).tolist()
    gradients = terms.gradients()
    updates = []
    for row, (steps, values, loss) in enumerate(zip(cohort, stack.values.cpu(), losses.cpu().T, strict=True)):
        metrics = {"loss": float(loss[: len(steps)].mean()), "seconds": seconds, "distance": distances[row]}
        adapter, num_examples = model.layout.unflatten(values), len(data.train[steps.client])
        updates.append(make_update(plan, steps, adapter, gradients[row], model.group_of, num_examples, metrics))
    return updates


def _rows(model: StackedModel, adapters: Sequence[Adapter]) -> Tensor:
    """(C, P): the adapters as rows; one row in memory where all are the same one."""
    if all(adapter is adapters[0] for adapter in adapters):
        return model.layout.flatten(adapters[0]).to(model.device).expand(len(adapters), -1)
    return torch.stack([model.layout.flatten(adapter) for adapter in adapters]).to(model.device)


def _backward(
    model: StackedModel, data: FederatedData, step: Step, batches: list[list[np.ndarray]], micro: int
) -> Tensor:
    """Gradients of each client's loss on its micro-batch number `micro`, as a part of its mean over the step's targets.

    Returns that part, (clients,).
    """
    num_targets = data.examples.num_targets
    own = [parts[micro] if micro < len(parts) else parts[0][:0] for parts in batches]
    width = max(map(len, own))
    samples = np.stack(
        [np.concatenate([o, np.full(width - len(o), parts[0][0])]) for o, parts in zip(own, batches, strict=True)]
    )
    weights = np.stack(
        [
            (np.arange(width) < len(o)) / num_targets[np.concatenate(parts)].sum()
            for o, parts in zip(own, batches, strict=True)
        ]
    )
    step.samples = samples.ravel()
    step.shapes = [(len(o), int(data.examples.lengths[o].max(initial=0))) for o in own]
    step.targets = num_targets[samples].sum(1)
    batch = data.examples.batch(step.samples, model.device)
    each = model.task.losses(model(step, batch), batch)
    weighted = each * model.tensor(weights.ravel().repeat(num_targets[step.samples]))
    losses = by_client(weighted, step.targets).sum(1)
    step.stack.backward(losses.sum())
    return losses.detach().float()


class LocalTerms:
    """What FedProx and SCAFFOLD add to the gradients of a stack, where a tensor is trained and on.

    g <- g + mu (theta - start) + (c - c_k)
    """

    def __init__(
        self, model: StackedModel, stack: Stack, plan: Plan, start: Tensor, corrections: Sequence[Adapter]
    ) -> None:
        self._model, self._stack, self._start = model, stack, start
        self._mu = plan.config.aggregation.proximal_mu
        self._sums = torch.zeros_like(stack.grads) if plan.config.aggregation.control_variates else None
        self._are_there = bool(self._mu) or any(corrections)
        if self._are_there:
            self._corrections = torch.zeros_like(stack.grads)
            for row, correction in zip(self._corrections, corrections, strict=True):
                for name, tensor in correction.items():
                    row[model.layout.spans[name]] = tensor.flatten()
            gates = np.full(model.layout.size, model.num_groups + 1)
            for gate, span in model.spans(plan.trained_parts):
                gates[span] = gate
            self._gates = model.tensor(gates)

    def add(self, rows: np.ndarray, on: np.ndarray) -> None:
        """Keep the gradients of a step, and add to those of the clients at `rows` where they are `on`."""
        grads = self._stack.grads
        if self._sums is not None:
            self._sums += grads
        if self._are_there:
            is_on = np.zeros((len(grads), self._model.num_groups + 2))  # the last two: heads, and what is not trained
            is_on[rows, :-2], is_on[rows, -2] = on, 1
            term = self._mu * (self._stack.values - self._start) + self._corrections
            grads += term * self._model.tensor(is_on).index_select(1, self._gates)

    def gradients(self) -> list[Adapter]:
        """Each client's own gradients, summed over the steps; empty where there are no control variates."""
        if self._sums is None:
            return [{}] * len(self._stack.grads)
        return [self._model.layout.unflatten(row) for row in self._sums.cpu()]


class StackedOptimizer:
    """torch's own optimiser, whose parameters are each client's trained part of each gate group, and of its head.

    A part that was off, or whose client has finished, has no gradient: value, moments and step
    count stay. Clients with as many steps share an optimiser, since rates follow progress.
    """

    def __init__(self, model: StackedModel, stack: Stack, plan: Plan, cohort: Sequence[LocalSteps]) -> None:
        self._training: TrainingConfig = plan.config.training
        self._grads = stack.grads
        spans = model.spans(plan.trained_parts)
        self._gates, head = [gate for gate, _ in spans], model.num_groups
        self._parts = [[values[span] for _, span in spans] for values in stack.values]
        self._grad_parts = [[grads[span] for _, span in spans] for grads in stack.grads]
        self._groups = []
        for length in sorted({len(steps) for steps in cohort}):
            parts = [
                (gate, part)
                for own, steps in zip(self._parts, cohort, strict=True)
                if len(steps) == length
                for gate, part in zip(self._gates, own, strict=True)
            ]
            adapters = [part for gate, part in parts if gate != head]
            heads = [part for gate, part in parts if gate == head]
            t = next(steps.t for steps in cohort if len(steps) == length)
            self._groups.append((make_optimizer(self._training, adapters, heads, many=True), t))

    def step(self, rows: np.ndarray, on: np.ndarray, step: int) -> None:
        """One step of the clients at `rows` of the stack, where they are `on` (rows, groups); clears gradients."""
        if self._training.max_grad_norm:
            norms = torch.linalg.vector_norm(self._grads, dim=1, keepdim=True)
            self._grads.mul_((self._training.max_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        for row, open_ in zip(rows, on, strict=True):
            is_on = [*open_, True]
            for gate, part, grad in zip(self._gates, self._parts[row], self._grad_parts[row], strict=True):
                part.grad = grad if is_on[gate] else None
        for optimizer, t in self._groups:
            if step < len(t):
                set_learning_rates(optimizer, self._training, t[step])
                optimizer.step()
        self._grads.zero_()
