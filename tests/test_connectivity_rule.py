"""The connectivity-guided average on landscapes whose hills are known.

Most adapters here are one number x, the head's bias, so that the line from a client to the average is a line of
numbers; the product path is told apart by adapters of rank 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.rule import Round
from copra_fl.aggregation.rules.connectivity import STEPS, Parameters, connectivity, on_factors, on_products
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.aggregation.rules.flexlora import flexlora
from tests.support.rounds import MODULES, dense, dense_ideal, make_round, random_adapter, random_round, relative, update

A, B = f"{MODULES[0]}.lora_A.weight", f"{MODULES[0]}.lora_B.weight"


class Landscape:
    """A score from a function of the head's bias, which counts what it was asked."""

    def __init__(self, loss: Callable[[float], float]) -> None:
        self.loss, self.calls = loss, []

    def __call__(self, adapters: Sequence[Adapter]) -> list[dict[str, float]]:
        self.calls.append(len(adapters))
        return [{"loss": self.loss(float(each["head.bias"])), "accuracy": 0.5} for each in adapters]


def numbers(before: float, clients: list[float], examples: list[int], landscape: Landscape, bound: float) -> Round:
    updates = [
        Update(i, {"head.bias": torch.tensor([x])}, n, (1, 1), {"loss": 1.0})
        for i, (x, n) in enumerate(zip(clients, examples, strict=True))
    ]
    return make_round({"head.bias": torch.tensor([before])}, updates, score=landscape, parameters=Parameters(bound))


@pytest.mark.parametrize(("minimum", "u"), [(2.0, 1.0), (1.0, 0.5), (1.6, 0.75), (2.4, 1.25), (9.0, 1.5)])
def test_it_walks_the_valley_to_the_best_point(minimum: float, u: float) -> None:
    """Old 0, clients 1 and 3, average 2; a convex loss has no barrier. 1 + 2 * 4 points of lines, 2 * 5 steps."""
    landscape = Landscape(lambda x: (x - minimum) ** 2)
    outcome = connectivity(numbers(0.0, [1.0, 3.0], [10, 10], landscape, 0.05))
    assert outcome.adapter["head.bias"].item() == 2 * u
    assert outcome.notes | {"merge_gap": None} == {
        "barrier": 0.0, "barriers": {"0": 0.0, "1": 0.0}, "down_weighted": [], "path": "factors", "u": u,
        "loss": pytest.approx((2 * u - minimum) ** 2), "scored": 19, "merge_gap": None,
    }  # fmt: skip
    assert landscape.calls == [9, 10]
    ends = ((1 - minimum) ** 2 + (3 - minimum) ** 2) / 2
    assert outcome.notes["merge_gap"] == {"loss": pytest.approx((2 - minimum) ** 2 - ends), "accuracy": 0.0}


def test_of_equally_good_points_it_takes_the_average() -> None:
    outcome = connectivity(numbers(0.0, [1.0, 3.0], [10, 30], Landscape(lambda x: 1.0), 0.05))
    assert (outcome.notes["path"], outcome.notes["u"]) == ("factors", 1.0)
    assert outcome.adapter["head.bias"].item() == 2.5


def bump(x: float) -> float:
    """A hill of height 1 at 6, foot at 5 and 7."""
    return max(0.0, 1 - abs(x - 6))


def test_who_is_behind_a_hill_counts_for_less_and_is_named() -> None:
    """Clients at 0, 0, 0, 8 of 30, 20, 10, 20 examples: average 2. Line 8 -> 2: x = 8, 6.5, 5, 3.5, 2, loss 0.5 at
    6.5, so barrier 0.5; bound 0.05: weight a tenth. New average 8 * 2 / (60 + 2); mean barrier 0.5 * 2 / 62.
    """
    outcome = connectivity(numbers(0.0, [0.0, 0.0, 0.0, 8.0], [30, 20, 10, 20], Landscape(bump), 0.05))
    assert outcome.notes["barriers"] == {"0": 0.0, "1": 0.0, "2": 0.0, "3": pytest.approx(0.5)}
    assert outcome.notes["down_weighted"] == [3]
    assert outcome.notes["barrier"] == pytest.approx(0.5 * 2 / 62)
    assert (outcome.notes["path"], outcome.notes["u"]) == ("factors", 1.0)
    assert outcome.adapter["head.bias"].item() == pytest.approx(8 * 2 / 62)


def test_the_step_is_counted_from_the_new_average() -> None:
    """As above with a loss that falls along the way: u = 1.5 of 16 / 62."""
    round_ = numbers(0.0, [0.0, 0.0, 0.0, 8.0], [30, 20, 10, 20], Landscape(lambda x: bump(x) - 0.001 * x), 0.05)
    outcome = connectivity(round_)
    assert outcome.notes["u"] == 1.5
    assert outcome.adapter["head.bias"].item() == pytest.approx(1.5 * 16 / 62)


@pytest.mark.parametrize("bound", [0.05, 0.0])
def test_a_round_that_is_not_connected_falls_back_to_the_product_average(bound: float) -> None:
    """Heads 0 and 1, average 1/2, and a hill of height 1 on the middle of either way."""

    def score(adapters: Sequence[Adapter]) -> list[dict[str, float]]:
        heads = [float(each["head.bias"][0]) for each in adapters]
        return [{"loss": abs(math.sin(2 * math.pi * head)), "accuracy": 0.5} for head in heads]

    updates = [update(i, random_adapter(i) | {"head.bias": torch.full((3,), float(i))}, 10) for i in range(2)]
    round_ = make_round(random_adapter(9), updates, parameters=Parameters(bound), score=score)
    outcome, products = connectivity(round_), flexlora(round_).adapter
    assert outcome.notes["path"] == "fallback" and outcome.notes["down_weighted"] == [0, 1]
    assert outcome.notes["barrier"] == pytest.approx(1.0) and outcome.notes["scored"] == 9
    assert all(torch.equal(outcome.adapter[name], products[name]) for name in products)


def test_a_loss_that_is_no_number_is_no_valley() -> None:
    """Nan on the lines: fallback. Nan beyond the average: not taken."""
    nowhere = numbers(0.0, [1.0, 3.0], [10, 10], Landscape(lambda x: math.nan), 0.05)
    assert connectivity(nowhere).notes["path"] == "fallback"
    beyond = numbers(0.0, [1.0, 2.0], [10, 10], Landscape(lambda x: math.nan if x > 2 else -x), 0.05)
    assert connectivity(beyond).notes["u"] == 1.25


def test_it_takes_the_path_of_products_where_that_is_better() -> None:
    """The loss is the distance of s B A from the ideal product, which FedAvg's factors miss."""
    round_ = random_round(3)
    goals = {module: dense_ideal(round_, module) for module in MODULES}

    def score(adapters: Sequence[Adapter]) -> list[dict[str, float]]:
        return [
            {"loss": sum(relative(dense(each, module), goals[module]) for module in MODULES), "accuracy": 0.5}
            for each in adapters
        ]

    outcome = connectivity(make_round(round_.before, round_.updates, score=score, parameters=Parameters(bound=100.0)))
    assert (outcome.notes["path"], outcome.notes["u"]) == ("products", 1.0)
    expected = flexlora(round_).adapter
    assert all(torch.allclose(outcome.adapter[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("u", STEPS)
def test_both_paths_by_dense_formulas(u: float) -> None:
    """Factors: (1 - u) old + u average. Products: best rank of (1 - u) s B A + u ideal, with the same head."""
    round_ = random_round(3)
    on, average = on_factors(round_, round_.weights, u), fedavg(round_).adapter
    for name, old in round_.before.items():
        assert torch.allclose(on[name], (1 - u) * old + u * average[name], atol=1e-6)
    products = on_products(round_, round_.weights, u)
    assert torch.equal(products["head.bias"], on["head.bias"])
    for module in MODULES:
        wanted = torch.from_numpy((1 - u) * dense(round_.before, module) + u * dense_ideal(round_, module))
        left, s, right = torch.linalg.svd(wanted, full_matrices=False)
        assert relative(dense(products, module), ((left[:, :2] * s[:2]) @ right[:2]).numpy()) < 1e-6


@pytest.mark.parametrize("u", STEPS)
def test_a_layer_that_is_off_stays_bitwise_on_both_paths(u: float) -> None:
    updates = [update(i, random_adapter(i), 10 + i, active=(1, 0)) for i in range(3)]
    round_ = make_round(random_adapter(9), updates, weighting="activity")
    for path in (on_factors, on_products):
        adapter = path(round_, round_.weights, u)
        off = [name for name in round_.before if MODULES[1] in name]
        assert off and all(torch.equal(adapter[name], round_.before[name]) for name in off)
