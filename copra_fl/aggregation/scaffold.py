"""SCAFFOLD: control variates against client drift (Karimireddy et al., arXiv 1910.06378).

    client   g <- g + c - c_k in each local step;    c_k+ = mean of the client's gradients g over the round's steps
    server   c = 1/N sum_k c_k,    sum_k c_k <- sum_k c_k + sum_k (c_k+ - c_k)

c_k+ is the paper's option II: with plain gradient descent the mean of the gradients is c_k - c + (start - end) / (steps
times rate). Here the gradients are measured, so that c_k+ is valid for every local optimizer. Option I, the gradient at
the start of the round over all data of the client, would cost another pass. A tensor that was off or not trained keeps
its control variate. So does a client whose reply was lost or rejected (`clients.client_state`): c is the mean of all
c_k after every round.
"""

from __future__ import annotations

from collections.abc import Sequence

from copra_fl.adapters.state import Adapter


def minus(a: Adapter, b: Adapter) -> Adapter:
    """Return a - b over the tensors of `a`; a client's control variate is 0 for tensors that it has not trained."""
    return {name: tensor - b.get(name, 0) for name, tensor in a.items()}


def next_sum(control_sum: Adapter, changes: Sequence[Adapter]) -> Adapter:
    """Return the sum of all clients' control variates after a round with these `changes`, c_k+ - c_k."""
    return {
        name: (old + sum(c[name].double() for c in changes if name in c)).float() for name, old in control_sum.items()
    }


def global_control(control_sum: Adapter, num_clients: int) -> Adapter:
    """Return c, the mean of the control variates of all `num_clients` clients, whose number can grow."""
    return {name: tensor / num_clients for name, tensor in control_sum.items()}
