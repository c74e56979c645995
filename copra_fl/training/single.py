"""Local training: a client starts from an adapter and gives an update.

One optimiser step of CopRA at progress t: draw a mask, switch the layers, minimise the
loss over what is on and what the round's rule trains. The mask holds for all micro-batches of the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from copra_fl.adapters.state import Adapter, Update, difference, norm, part_of
from copra_fl.data.federated import FederatedData
from copra_fl.models.adapted import AdaptedModel
from copra_fl.seeding import torch_stream
from copra_fl.training.batches import plan_steps
from copra_fl.training.optimizer import make_optimizer, set_learning_rates
from copra_fl.training.plan import Plan
from copra_fl.training.update import make_update


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
