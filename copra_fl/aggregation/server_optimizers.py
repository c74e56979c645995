"""Server optimizers: treat the change of the average as a gradient step (Reddi et al., arXiv 2003.00295).

    g = average - old,    new = old + eta step(g)

    fedavgm      m <- beta m + g                  step = m                      (Hsu et al., arXiv 1909.06335)
    all others   m <- beta m + (1 - beta) g       step = m / (sqrt(v) + tau)
    fedadagrad   v <- v + g^2
    fedyogi      v <- v - (1 - beta2) g^2 sign(v - g^2)
    fedadam      v <- beta2 v + (1 - beta2) g^2

m starts at 0 and v at tau^2, without bias correction, as in the paper. The paper's FedAdagrad has beta = 0, that is,
server-momentum = 0; the default of 0.9 holds for all of them.
A tensor that no client trained does not move and keeps its moments, so momentum does not move a layer that is off.
Traffic: none, the moments stay on the server.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter
from copra_fl.config import AggregationConfig

#: (settings, g, m or 0, v or tau^2) -> step before the learning rate, m, v; float64
Moment = Callable[[AggregationConfig, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _fedavgm(settings: AggregationConfig, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = settings.server_momentum * m + g
    return m, m, v


def _adaptive(second: Callable[[AggregationConfig, Tensor, Tensor], Tensor]) -> Moment:
    def moment(settings: AggregationConfig, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = settings.server_momentum * m + (1 - settings.server_momentum) * g
        v = second(settings, g.square(), v)
        return m / (v.sqrt() + settings.server_tau), m, v

    return moment


SERVER_OPTIMIZERS: dict[str, Moment] = {
    "fedavgm": _fedavgm,
    "fedadagrad": _adaptive(lambda settings, square, v: v + square),
    "fedyogi": _adaptive(lambda settings, square, v: v - (1 - settings.server_beta2) * square * (v - square).sign()),
    "fedadam": _adaptive(lambda settings, square, v: settings.server_beta2 * v + (1 - settings.server_beta2) * square),
}


def step(
    settings: AggregationConfig, before: Adapter, average: Adapter, first: Adapter, second: Adapter
) -> tuple[Adapter, Adapter, Adapter]:
    """Return the next adapter and the next first and second moments.

    Args:
        settings: the run's settings, with server-optimizer other than ``none``.
        before: the old global adapter.
        average: the adapter that the rule returned.
        first: first moments m; empty at the start of a run.
        second: second moments v; empty at the start of a run.
    """
    moment = SERVER_OPTIMIZERS[settings.server_optimizer]
    adapter, first, second = dict(before), dict(first), dict(second)
    for name, old in before.items():
        if torch.equal(average[name], old):
            continue
        wide = old.double()
        m = first.get(name, torch.zeros_like(old)).double()
        v = second[name].double() if name in second else torch.full_like(wide, settings.server_tau**2)
        change, m, v = moment(settings, average[name].double() - wide, m, v)
        adapter[name] = (wide + settings.server_learning_rate * change).to(old.dtype)
        first[name], second[name] = m.to(old.dtype), v.to(old.dtype)
    return adapter, first, second
