"""Server optimisers against torch.optim and the formulas of Reddi et al. (arXiv 2003.00295), in float64."""

from __future__ import annotations

import math

import pytest
import torch

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.server_optimizers import SERVER_OPTIMIZERS, step
from copra_fl.config import KEYS, AggregationConfig

AVERAGES = [1.0, -0.5, 2.0, 2.5]  # of the rounds, each a number


def settings(name: str, **others: float) -> AggregationConfig:
    return AggregationConfig(server_optimizer=name, server_learning_rate=0.3, **others)


def run(settings: AggregationConfig, averages: list[float]) -> list[float]:
    """The global adapter, one number that starts at 0.25, after each round."""
    x: Adapter = {"w": torch.tensor([0.25], dtype=torch.float64)}
    first: Adapter = {}
    second: Adapter = {}
    path = []
    for average in averages:
        x, first, second = step(settings, x, {"w": torch.tensor([average], dtype=torch.float64)}, first, second)
        path.append(x["w"].item())
    return path


def test_every_name_of_the_configuration_is_there() -> None:
    assert {"none", *SERVER_OPTIMIZERS} == set(KEYS["server-optimizer"].choices)


def test_fedavgm_is_sgd_with_momentum_on_the_pseudo_gradient() -> None:
    w = torch.nn.Parameter(torch.tensor([0.25], dtype=torch.float64))
    sgd = torch.optim.SGD([w], lr=0.3, momentum=0.9)
    expected = []
    for average in AVERAGES:
        w.grad = w.detach() - average
        sgd.step()
        expected.append(w.item())
    assert run(settings("fedavgm"), AVERAGES) == pytest.approx(expected, rel=1e-12)


def test_fedavgm_without_momentum_at_rate_one_is_the_average() -> None:
    plain = AggregationConfig(server_optimizer="fedavgm", server_learning_rate=1.0, server_momentum=0.0)
    assert run(plain, AVERAGES) == pytest.approx(AVERAGES)


def test_fedadagrad_is_torchs() -> None:
    """With beta = 0; torch starts its sum at tau^2 and calls tau eps."""
    w = torch.nn.Parameter(torch.tensor([0.25], dtype=torch.float64))
    adagrad = torch.optim.Adagrad([w], lr=0.3, initial_accumulator_value=0.01**2, eps=0.01)
    expected = []
    for average in AVERAGES:
        w.grad = w.detach() - average
        adagrad.step()
        expected.append(w.item())
    found = run(settings("fedadagrad", server_momentum=0.0, server_tau=0.01), AVERAGES)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_ones_by_their_formulas(name: str) -> None:
    """m = 0, v = tau^2 at the start, no correction for either."""
    x, m, v, beta, beta2, tau = 0.25, 0.0, 0.01**2, 0.8, 0.9, 0.01
    expected = []
    for average in AVERAGES:
        g = average - x
        m = beta * m + (1 - beta) * g
        v = {
            "fedadagrad": v + g**2,
            "fedyogi": v - (1 - beta2) * g**2 * math.copysign(1.0, v - g**2),
            "fedadam": beta2 * v + (1 - beta2) * g**2,
        }[name]
        x += 0.3 * m / (math.sqrt(v) + tau)
        expected.append(x)
    found = run(settings(name, server_momentum=beta, server_beta2=beta2, server_tau=tau), AVERAGES)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_first_step_of_fedadam_by_hand() -> None:
    """g = 0.75: m = 0.075, v = 0.99e-6 + 0.01 * 0.5625; 0.25 + 0.3 * 0.075 / (sqrt(v) + 1e-3)."""
    expected = 0.25 + 0.0225 / (math.sqrt(0.00562599) + 0.001)
    assert run(settings("fedadam"), [1.0]) == pytest.approx([expected])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_what_nobody_trained_stays_bitwise_and_keeps_its_moments(name: str) -> None:
    before = {"on": torch.tensor([1.0, 2.0]), "off": torch.tensor([0.1, 0.2])}
    moved = {"on": torch.tensor([1.5, 2.0]), "off": torch.tensor([0.3, 0.1])}
    x, first, second = step(settings(name), before, moved, {}, {})
    only = {"on": torch.tensor([0.0, 0.0]), "off": x["off"].clone()}
    y, later_first, later_second = step(settings(name), x, only, first, second)
    assert torch.equal(y["off"], x["off"]) and not torch.equal(y["on"], x["on"])
    for moment, later in ((first, later_first), (second, later_second)):
        assert torch.equal(moment["off"], later["off"])
    assert not torch.equal(first["on"], later_first["on"])
    untouched, empty, nothing = step(settings(name), before, dict(before), {}, {})
    assert all(torch.equal(untouched[n], before[n]) for n in before) and not empty and not nothing


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_step_is_pure_and_float32(name: str) -> None:
    before, average = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    first, second = {"w": torch.tensor([0.5])}, {"w": torch.tensor([0.25])}
    x, m, v = step(settings(name), before, average, first, second)
    again = step(settings(name), before, average, first, second)
    assert all(each["w"].dtype == torch.float32 for each in (x, m, v))
    assert all(torch.equal(one["w"], other["w"]) for one, other in zip((x, m, v), again, strict=True))
    assert (before["w"].item(), first["w"].item(), second["w"].item()) == (1.0, 0.5, 0.25)
