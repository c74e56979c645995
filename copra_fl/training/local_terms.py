"""FedProx and SCAFFOLD: terms that are added to the gradients of local training.

    g <- g + mu (theta - theta_start) + (c - c_k)

mu (theta - theta_start) is the gradient of the proximal penalty mu/2 |theta - theta_start|^2 of FedProx (Li et al.,
arXiv 1812.06127), with ``proximal-mu`` as mu. c - c_k is the correction of SCAFFOLD (Karimireddy et al.,
arXiv 1910.06378): the server's control variate minus the client's, with ``control-variates``.

Both terms apply only to tensors that are trained and whose gate group is on in the step, and before clipping.
SCAFFOLD's new c_k is the mean of the client's own gradients, so these are summed before the terms are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from copra_fl.adapters.state import Adapter
from copra_fl.training.plan import Plan, Start
from copra_fl.training.stacked import StackedModel
from copra_fl.training.stacked.step import Stack


def add_local_terms(grads: Adapter, parameters: Mapping[str, nn.Parameter], start: Start, mu: float) -> None:
    """Add the terms to `grads`, the gradients of one client by tensor name, in place."""
    for name, grad in grads.items():
        if mu:
            grad += mu * (parameters[name].detach() - start.adapter[name].to(grad.device))
        if name in start.correction:
            grad += start.correction[name].to(grad.device)


class StackedLocalTerms:
    """The terms for the gradients of a cohort, one row per client.

    `start_values` (C, P) are the values of the stack before training.
    """

    def __init__(
        self, model: StackedModel, stack: Stack, plan: Plan, start_values: Tensor, corrections: Sequence[Adapter]
    ) -> None:
        self._model, self._stack, self._start_values = model, stack, start_values
        self._mu = plan.config.aggregation.proximal_mu
        self._sums = torch.zeros_like(stack.grads) if plan.config.aggregation.control_variates else None
        self._has_terms = bool(self._mu) or any(corrections)
        if self._has_terms:
            self._corrections = torch.zeros_like(stack.grads)
            for row, correction in zip(self._corrections, corrections, strict=True):
                for name, tensor in correction.items():
                    row[model.layout.spans[name]] = tensor.flatten()
            gates = np.full(model.layout.size, model.num_groups + 1)
            for gate, span in model.spans(plan.trained_parts):
                gates[span] = gate
            self._gates = model.tensor(gates)

    def add(self, rows: np.ndarray, on: np.ndarray) -> None:
        """Sum up the gradients of a step, then add the terms for the clients at `rows` where they are `on`."""
        grads = self._stack.grads
        if self._sums is not None:
            self._sums += grads
        if self._has_terms:
            is_on = np.zeros((len(grads), self._model.num_groups + 2))  # last two columns: head, untrained tensors
            is_on[rows, :-2], is_on[rows, -2] = on, 1
            term = self._mu * (self._stack.values - self._start_values) + self._corrections
            grads += term * self._model.tensor(is_on).index_select(1, self._gates)

    def gradient_sums(self) -> list[Adapter]:
        """Return the sum over the steps of each client's own gradients; empty without control variates."""
        if self._sums is None:
            return [{}] * len(self._stack.grads)
        return [self._model.layout.unflatten(row) for row in self._sums.cpu()]
