"""Barriers on curves whose barriers are known by hand."""

from __future__ import annotations

import pytest
import torch

from copra_fl.adapters.interpolation import LossPath, interpolate, merge_gap, walk


def double_well(adapters: list[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """loss(x) = (x^2 - 1)^2: minima at -1 and 1, a hill of height 1 at 0."""
    xs = [float(adapter["x"]) for adapter in adapters]
    return [{"loss": (x * x - 1) ** 2, "accuracy": abs(x)} for x in xs]


def at(x: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(x, dtype=torch.float64)}


def test_a_hill_between_two_minima() -> None:
    path = walk(double_well, at(-1.0), at(1.0), 21)
    assert path.u[0] == 0.0 and path.u[10] == 0.5 and path.u[-1] == 1.0
    assert path.barrier_entezari == pytest.approx(1.0)
    assert path.barrier_frankle == pytest.approx(1.0)
    assert path.midpoint_gap == pytest.approx(-1.0)


def test_the_two_barriers_differ_where_the_ends_do() -> None:
    """A straight line from loss 0 to 4: no barrier over the line, 2 above the mean of the ends."""
    path = LossPath(u=(0.0, 0.5, 1.0), loss=(0.0, 2.0, 4.0), accuracy=(1.0, 0.9, 0.6))
    assert path.barrier_entezari == 0.0
    assert path.barrier_frankle == 2.0
    assert path.midpoint_gap == pytest.approx(0.1)


def test_a_valley_has_no_barrier() -> None:
    path = walk(lambda some: [{"loss": float(a["x"]) ** 2, "accuracy": 0.0} for a in some], at(-2.0), at(1.0), 11)
    assert path.barrier_entezari == 0.0
    assert path.barrier_frankle == pytest.approx(4.0 - 2.5)


def test_interpolation_is_exact_at_its_ends() -> None:
    a, b = {"x": torch.tensor([0.1, 1e20])}, {"x": torch.tensor([0.3, -1e20])}
    assert torch.equal(interpolate(a, b, 0.0)["x"], a["x"])
    assert torch.equal(interpolate(a, b, 1.0)["x"], b["x"])
    assert interpolate(at(2.0), at(6.0), 0.25)["x"] == 3.0


def test_merge_gap_by_hand() -> None:
    """Clients 0.5 and 0.8 with weights 2 : 1 have mean 0.6; the average has 0.7."""
    clients = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 4.0, "accuracy": 0.8}]
    gap = merge_gap({"loss": 1.5, "accuracy": 0.7}, clients, [20, 10])
    assert gap == pytest.approx({"loss": -0.5, "accuracy": 0.1})
