"""Local training of a cohort: its clients step together through one shared base.

Each client has its own data order, masks, dropout, clipping, learning rates and number of steps, and ends with the
adapter that `single.train_client` gives it alone, up to floating-point rounding. Adam and SGD work element by element,
so one optimizer over the stacked rows equals one optimizer per client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, OptimizerState, Update
from copra_fl.config import Config, TrainingConfig
from copra_fl.copra.layers import by_depth
from copra_fl.data.federated import FederatedData
from copra_fl.models.kept_bytes import KeptBytes
from copra_fl.seeding import derive
from copra_fl.tasks import Inputs
from copra_fl.training.batches import LocalSteps, plan_steps
from copra_fl.training.grams import GramSums, tokens_of
from copra_fl.training.local_terms import StackedLocalTerms
from copra_fl.training.operations import local_flops
from copra_fl.training.optimizer import make_optimizer, read_state, set_learning_rates, write_state
from copra_fl.training.plan import Plan, Start, num_steps
from copra_fl.training.points import StackedPoints, step_points
from copra_fl.training.stacked import StackedModel
from copra_fl.training.stacked.step import ClientRows, Fallback, Stack, Step, by_client, on_device, views
from copra_fl.training.update import make_update


def slices(config: Config, data: FederatedData, clients: Sequence[int]) -> list[tuple[int, ...]]:
    """Return `clients` in slices that train together, so that no step has more than ``step-tokens`` tokens, rounded up
    to whole clients.

    Clients of one depth with similar numbers of steps share a slice; within a depth, most steps come first.
    """
    return [part for tier in by_depth(config, clients).values() for part in _slices(config, data, tier)]


def _slices(config: Config, data: FederatedData, clients: Sequence[int]) -> list[tuple[int, ...]]:
    """Return clients of one depth in slices, as `slices` does."""
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
    starts: Mapping[int, Start],
    progress: Callable[[float], None] = lambda num_clients: None,
) -> list[Update]:
    """Train `clients` together for one round, each from its entry of `starts`, and return their updates.

    `clients` are one of the `slices`. After each step `progress` is called with the work done, in clients: all steps of
    a client count as 1.
    """
    started = time.perf_counter()
    cohort = [plan_steps(plan, data, client, model.num_groups) for client in clients]
    lengths = np.array([len(steps) for steps in cohort])
    start_values = _rows(model, [starts[client].adapter for client in clients])
    stack = Stack(model.layout, start_values.clone(), plan.trained_parts)
    optimizer = StackedOptimizer(model, stack, plan, cohort)
    optimizer.write_states([starts[client].optimizer for client in clients])
    older = list(zip(*(starts[client].anchors for client in clients), strict=True))
    anchors = [start_values, *(_rows(model, adapters) for adapters in older)]
    points = StackedPoints(model, anchors)
    terms = StackedLocalTerms(model, stack, plan, start_values, [starts[client].correction for client in clients])
    losses = torch.zeros(lengths.max(), len(cohort), device=model.device)
    gram_sums = GramSums(len(cohort)) if plan.collects_grams else None
    kept = KeptBytes([*model.base_tensors(), stack.values, start_values]) if plan.config.copra.client_depths else None
    for index in range(lengths.max()):
        rows, step = _make_step(model, plan, stack, start_values, cohort, index)
        batches = [cohort[row].batches[index] for row in rows]
        by_client_points = [step_points(plan.config, cohort[row].positions[index], len(anchors)) for row in rows]
        for number, client_points in enumerate(zip(*by_client_points, strict=True)):
            recorded = gram_sums if number == 0 else None
            with points.moved(step, rows, client_points) as moved_step:
                for micro_batch in range(max(map(len, batches))):
                    part = _backward(model, data, moved_step, rows, batches, micro_batch, kept, recorded)
                    if number == 0:
                        losses[index, model.tensor(rows)] += part
        if step.stack is not stack:
            stack.grads.index_copy_(0, model.tensor(rows), step.stack.grads)
        terms.add(rows, step.on)
        optimizer.step(rows, step.on, index)
        progress(float((1 / lengths[rows]).sum()))
    distances = torch.linalg.vector_norm(stack.values.double() - start_values, dim=1).tolist()  # waits for the device
    seconds = (time.perf_counter() - started) / len(cohort)
    gradient_sums = terms.gradient_sums()
    states = optimizer.read_states() if plan.config.training.optimizer_state != "fresh" else [{}] * len(cohort)
    updates = []
    for row, (steps, values, loss) in enumerate(zip(cohort, stack.values.cpu(), losses.cpu().T, strict=True)):
        metrics = {
            "loss": float(loss[: len(steps)].mean()),
            "seconds": seconds,
            "distance": distances[row],
            "flops": local_flops(plan.config, model.size, steps, data.examples, len(anchors)),
        }
        metrics |= {"memory": kept.peak} if kept else {}
        adapter, num_examples = model.layout.unflatten(values), len(data.train[steps.client])
        grams = gram_sums.matrices(row, plan.config.aggregation.gram_shrinkage) if gram_sums else {}
        update = make_update(
            plan, steps, adapter, gradient_sums[row], states[row], model.group_of, num_examples, metrics, grams
        )
        updates.append(update)
    return updates


def _rows(model: StackedModel, adapters: Sequence[Adapter]) -> Tensor:
    """Return the adapters as rows (C, P); one row in memory if all are the same object."""
    if all(adapter is adapters[0] for adapter in adapters):
        return model.layout.flatten(adapters[0]).to(model.device).expand(len(adapters), -1)
    return torch.stack([model.layout.flatten(adapter) for adapter in adapters]).to(model.device)


def _make_step(
    model: StackedModel,
    plan: Plan,
    stack: Stack,
    start_values: Tensor,
    cohort: Sequence[LocalSteps],
    index: int,
) -> tuple[np.ndarray, Step]:
    """Return step `index` of the clients that have so many, sorted by the depth of their lowest active adapter.

    With it come the clients' rows in the cohort.
    """
    rows = np.array([row for row, steps in enumerate(cohort) if len(steps) > index])
    on = np.stack([cohort[row].masks[index] for row in rows])
    depth = model.depth(on)
    order = np.argsort(depth, kind="stable")
    rows, on, depth = rows[order], on[order], depth[order]
    scale = model.tensor([cohort[row].scales[index] for row in rows])
    seed, dropout = plan.config.federation.seed, plan.config.model.lora_dropout
    seeds = [derive(seed, "dropout", plan.server_round, cohort[row].client, index) for row in rows if dropout]
    streams = [torch.Generator(model.device).manual_seed(stream_seed) for stream_seed in seeds]
    fallback = None
    if plan.config.copra.off == "global":
        fallback = _fallback(model, start_values, rows, [cohort[row].rank_scale for row in rows])
    return rows, Step(stack.select(rows), on, depth, scale, streams, fallback)


def _fallback(model: StackedModel, start_values: Tensor, rows: np.ndarray, scales: Sequence[float]) -> Fallback:
    """Return the adapters of the clients at `rows` of `start_values`, for layers that are off."""
    shared = start_values.stride(0) == 0
    values = start_values[0] if shared else start_values.index_select(0, model.tensor(rows))
    return Fallback(views(values, model.layout), shared, model.tensor(scales))


def _backward(
    model: StackedModel,
    data: FederatedData,
    step: Step,
    clients: np.ndarray,
    batches: list[list[np.ndarray]],
    micro_batch: int,
    kept: KeptBytes | None,
    gram_sums: GramSums | None,
) -> Tensor:
    """Add up the gradients of each client's loss on one micro-batch, and return these losses (clients,).

    `clients` are the rows of the step's clients in the cohort, `batches` their micro-batches. A loss is the sum over
    the targets of the micro-batch, divided by the number of targets in all micro-batches of the client's step. Clients
    with fewer examples in the micro-batch than others get more rows of their first example, with weight 0. `kept`
    counts the bytes that autograd keeps, per client and without the step's copy of the adapters. The inputs of adapters
    go into `gram_sums`.
    """
    examples = data.examples
    chosen = [parts[micro_batch] if micro_batch < len(parts) else parts[0][:0] for parts in batches]
    samples = np.empty((len(batches), max(map(len, chosen))), dtype=int)
    weights = np.zeros(samples.shape)
    for row, (indices, parts) in enumerate(zip(chosen, batches, strict=True)):
        samples[row, : len(indices)], samples[row, len(indices) :] = indices, parts[0][0]
        weights[row, : len(indices)] = 1 / examples.num_targets[np.concatenate(parts)].sum()
    shapes = [(len(indices), int(examples.lengths[indices].max(initial=0))) for indices in chosen]
    targets = examples.num_targets[samples].sum(1)
    rows = ClientRows(shapes, targets)
    batch = examples.batch(samples.ravel(), model.device)
    record = partial(_record, gram_sums, clients, _is_token(batch, shapes)) if gram_sums else None
    with kept.counting(1 / len(batches), [step.stack.values]) if kept else nullcontext():
        target_losses = model.task.losses(model(step, batch, rows, record), batch)
    weighted = target_losses * model.tensor(weights.ravel().repeat(examples.num_targets[samples.ravel()]))
    losses = by_client(weighted, targets).sum(1)
    step.stack.backward(losses.sum())
    return losses.detach().float()


def _is_token(batch: Inputs, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Return (clients, rows, tokens) bool: False for padding and for rows beyond the clients' own, as in `shapes`."""
    by_client = tokens_of(batch).unflatten(0, (len(shapes), -1))
    rows = torch.arange(by_client.shape[1], device=by_client.device)
    numbers = torch.tensor([num_rows for num_rows, _ in shapes], device=by_client.device)
    return by_client & (rows < numbers[:, None])[..., None]


def _record(
    gram_sums: GramSums, clients: np.ndarray, is_token: Tensor, module: str, positions: np.ndarray, values: Tensor
) -> None:
    rows, places = (on_device(index, values.device) for index in (clients[positions], positions))
    gram_sums.add(module, rows, values, is_token[places])


class StackedOptimizer:
    """torch's optimizer over all clients: its parameters are each client's trained part of each gate group and the
    head.

    A part that was off, or that belongs to a client that has finished, has no gradient, so its values, moments and step
    count stay. Clients with equally many steps share an optimizer, because learning rates follow progress.
    """

    def __init__(self, model: StackedModel, stack: Stack, plan: Plan, cohort: Sequence[LocalSteps]) -> None:
        self._training: TrainingConfig = plan.config.training
        self._grads = stack.grads
        spans, head = model.spans(plan.trained_parts), model.num_groups
        self._gates = [gate for gate, _ in spans]
        self._layouts = [model.layout.within(span) for _, span in spans]
        self._parts = [[values[span] for _, span in spans] for values in stack.values]
        self._grad_parts = [[grads[span] for _, span in spans] for grads in stack.grads]
        self._lengths = [len(steps) for steps in cohort]
        self._t = {len(steps): steps.t for steps in cohort}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        for length in sorted(self._t):
            parts = [
                (gate, part)
                for client_parts, client_length in zip(self._parts, self._lengths, strict=True)
                if client_length == length
                for gate, part in zip(self._gates, client_parts, strict=True)
            ]
            adapters = [part for gate, part in parts if gate != head]
            heads = [part for gate, part in parts if gate == head]
            self._optimizers[length] = make_optimizer(self._training, adapters, heads, many=True)

    def step(self, rows: np.ndarray, on: np.ndarray, index: int) -> None:
        """Clip, make step `index` for the clients at `rows` where they are `on` (rows, groups), and clear gradients."""
        if self._training.max_grad_norm:
            norms = torch.linalg.vector_norm(self._grads, dim=1, keepdim=True)
            self._grads.mul_((self._training.max_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        for row, open_gates in zip(rows, on, strict=True):
            is_on = [*open_gates, True]
            for gate, part, grad in zip(self._gates, self._parts[row], self._grad_parts[row], strict=True):
                part.grad = grad if is_on[gate] else None
        for length, optimizer in self._optimizers.items():
            if index < length:
                set_learning_rates(optimizer, self._training, self._t[length][index])
                optimizer.step()
        self._grads.zero_()

    def write_states(self, states: Sequence[OptimizerState]) -> None:
        """Set the moments and step counts of each client to its entry of `states`.

        The tensors of a part have had the same steps, so one count stands for all of them.
        """
        for length, parts, state in zip(self._lengths, self._parts, states, strict=True):
            for part, layout in zip(parts, self._layouts, strict=True):
                name = next(iter(layout.shapes))
                values = {kind: tensors for kind, tensors in state.items() if name in tensors}
                joined = {k: {name: t[name] if k == "step" else layout.flatten(t)} for k, t in values.items()}
                write_state(self._optimizers[length], {name: part}, joined)

    def read_states(self) -> list[OptimizerState]:
        """Return the moments and step counts of each client, tensor by tensor."""
        states = []
        for length, parts in zip(self._lengths, self._parts, strict=True):
            state: OptimizerState = {}
            for part, layout in zip(parts, self._layouts, strict=True):
                for kind, values in read_state(self._optimizers[length], {"part": part}).items():
                    value = values["part"]
                    counts = {name: value.clone() for name in layout.shapes}
                    state.setdefault(kind, {}).update(counts if kind == "step" else layout.unflatten(value))
            states.append(state)
        return states
