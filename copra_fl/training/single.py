"""Local training of one client with plain PEFT.

One optimizer step of CopRA at progress t: draw a mask, switch the layers, minimize the loss over the adapters that are
on and that the round's aggregation rule trains. The mask holds for all micro-batches of the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from copra_fl.adapters.state import Adapter, Update, difference, norm, part_of
from copra_fl.data.federated import FederatedData
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.kept_bytes import KeptBytes
from copra_fl.seeding import torch_stream
from copra_fl.training.batches import plan_steps
from copra_fl.training.grams import GramSums, recording
from copra_fl.training.local_terms import add_local_terms
from copra_fl.training.operations import local_flops
from copra_fl.training.optimizer import make_optimizer, read_state, set_learning_rates, write_state
from copra_fl.training.plan import Plan, Start
from copra_fl.training.points import Point, moved, step_points
from copra_fl.training.update import make_update


def train_client(model: AdaptedModel, data: FederatedData, plan: Plan, client: int, start: Start) -> Update:
    """Train `client` for one round from `start`, with its own data and random streams, and return its update.

    This is ``engine = "peft"`` and the reference for `cohort.train_cohort`.
    """
    started = time.perf_counter()
    training, aggregation, seed = plan.config.training, plan.config.aggregation, plan.config.federation.seed
    steps = plan_steps(plan, data, client, len(model.gates.names))
    model.zero_grad(set_to_none=True)  # of a client that failed between backward pass and optimizer step
    model.write_adapter(start.adapter)
    model.train_adapters(True)
    parameters = model.train_only(plan.trained_parts)
    heads = [parameter for name, parameter in parameters.items() if part_of(name) == "head"]
    adapters = [parameter for name, parameter in parameters.items() if part_of(name) != "head"]
    optimizer = make_optimizer(training, adapters, heads)
    write_state(optimizer, parameters, start.optimizer)
    losses, gradient_sums = [], dict[str, Tensor]()
    gram_sums = GramSums(1) if plan.collects_grams else None
    kept = KeptBytes([*model.parameters(), *model.buffers()]) if plan.config.copra.client_depths else None
    anchors = (start.adapter, *start.anchors)
    off = start.adapter if plan.config.copra.off == "global" else {}
    with model.fallback(off, steps.rank_scale):
        for step, micro_batches in enumerate(steps.batches):
            set_learning_rates(optimizer, training, steps.t[step])
            model.gates.set(steps.masks[step], steps.scales[step])
            with torch_stream(model.device, seed, "dropout", plan.server_round, client, step):
                points = step_points(plan.config, steps.positions[step], len(anchors))
                losses.append(_add_up_points(model, data, micro_batches, parameters, anchors, points, kept, gram_sums))
            grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
            if aggregation.control_variates:
                gradient_sums |= {name: grad + gradient_sums.get(name, 0) for name, grad in grads.items()}
            add_local_terms(grads, parameters, start, aggregation.proximal_mu)
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    adapter = model.read_adapter()
    metrics = {
        "loss": float(torch.stack(losses).mean()),
        "seconds": time.perf_counter() - started,
        "distance": norm(difference(adapter, start.adapter)),
        "flops": local_flops(plan.config, model.size, steps, data.examples, len(anchors)),
    }
    metrics |= {"memory": kept.peak} if kept else {}
    gradient_sums = {name: gradient.cpu() for name, gradient in gradient_sums.items()}
    state = read_state(optimizer, parameters) if training.optimizer_state != "fresh" else {}
    grams = gram_sums.matrices(0, aggregation.gram_shrinkage) if gram_sums else {}
    num_examples = len(data.train[client])
    return make_update(plan, steps, adapter, gradient_sums, state, model.group_of, num_examples, metrics, grams)


def _add_up_points(
    model: AdaptedModel,
    data: FederatedData,
    micro_batches: list[np.ndarray],
    parameters: Mapping[str, nn.Parameter],
    anchors: Sequence[Adapter],
    points: Sequence[Point],
    kept: KeptBytes | None,
    gram_sums: GramSums | None,
) -> Tensor:
    """Set the gradients of `parameters` to those of the losses at all `points`, and return the loss at the first."""
    losses, totals = [], dict[str, Tensor]()
    for number, point in enumerate(points):
        recorded = gram_sums if number == 0 else None
        with moved(parameters, anchors[point.anchor], point):
            losses.append(_accumulate_gradients(model, data, micro_batches, kept, recorded))
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                grad = point.weight * point.position(name) * parameter.grad
                totals[name] = totals[name] + grad if name in totals else grad
                parameter.grad = None
    for name, total in totals.items():
        parameters[name].grad = total
    return losses[0]


def _accumulate_gradients(
    model: AdaptedModel,
    data: FederatedData,
    micro_batches: list[np.ndarray],
    kept: KeptBytes | None,
    gram_sums: GramSums | None,
) -> Tensor:
    """Add up the gradients of the mean loss over all targets of the micro-batches, and return that loss.

    The result is as if the micro-batches were one batch. There are no gradients if every adapter is off and no head is
    trained. `kept` counts the bytes that autograd keeps. The inputs of adapters go into `gram_sums`.
    """
    num_targets = int(data.examples.num_targets[np.concatenate(micro_batches)].sum())
    loss = torch.zeros((), device=model.device)
    for indices in micro_batches:
        batch = data.examples.batch(indices, model.device)
        with kept.counting() if kept else nullcontext(), recording(model, gram_sums, batch):
            part = model.losses(batch).sum() / num_targets
        if part.requires_grad:
            part.backward()
        loss += part.detach()
    return loss
