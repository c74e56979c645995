"""The maths of products against dense matrices, and the aggregation error against what it is by definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from copra_fl.aggregation import RULES, find_rule
from copra_fl.aggregation.products import aggregation_error, as_residual, best_rank, frobenius, ideal, modules, stack
from copra_fl.aggregation.rule import Outcome
from copra_fl.aggregation.rules.fedavg import fedavg
from tests.support.rounds import (
    MODULES,
    D,
    K,
    aggregate,
    dense_ideal,
    dense_made,
    make_round,
    random_adapter,
    random_round,
    relative,
    start,
    update,
)


def factors(seed: int, d: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(d, n, generator=rng, dtype=torch.float64), torch.randn(n, k, generator=rng, dtype=torch.float64)


def test_modules_are_named_before_lora() -> None:
    assert modules(random_adapter(0)) == list(MODULES)


@pytest.mark.parametrize("columns", [1, 3, 12])  # fewer and more than d = 7 and k = 5
def test_the_norm_of_a_product_is_that_of_its_matrix(columns: int) -> None:
    b, a = factors(0, D, columns, K)
    assert frobenius((b, a)) == pytest.approx(float(torch.linalg.matrix_norm(b @ a)), rel=1e-12)


def test_the_norm_of_nothing_is_zero() -> None:
    assert frobenius(stack([(torch.zeros(D, 2).double(), torch.randn(2, K).double())])) == 0.0


def test_equal_products_of_unequal_factors_differ_by_rounding_of_float64_alone() -> None:
    """B A = (B Q)(Q^T A): a squared norm less twice an inner product would say 1e-8."""
    b, a = factors(0, 300, 8, 200)
    q = torch.linalg.qr(factors(1, 8, 8, 8)[0]).Q
    assert frobenius(stack([(b, a), (-b @ q, q.T @ a)])) / frobenius((b, a)) < 3e-15


def test_a_tiny_difference_is_measured_and_not_rounded_away() -> None:
    b, a = factors(0, 300, 8, 200)
    off_b, off_a = factors(1, 300, 1, 200)
    found = frobenius(stack([(b, a), (1e-10 * off_b, off_a), (-b, a)]))
    assert found == pytest.approx(1e-10 * frobenius((off_b, off_a)), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("columns", [6, 12])
def test_best_rank_is_the_truncated_svd_of_the_dense_matrix(rank: int, columns: int) -> None:
    product = factors(2, D, columns, K)
    b, a = best_rank(product, rank)
    u, s, vt = torch.linalg.svd(product[0] @ product[1], full_matrices=False)
    assert torch.allclose(b @ a, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-12)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1)) and torch.allclose(b.norm(dim=0) ** 2, s[:rank])
    assert torch.equal(b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0, torch.ones(1, rank, dtype=torch.bool))


def test_best_rank_past_the_rank_of_the_product_is_zero() -> None:
    b, a = factors(3, D, 2, K)
    twice = stack([(b, a), (b, a)])  # four columns, rank 2
    best_b, best_a = best_rank(twice, 4)
    assert torch.allclose(best_b @ best_a, 2 * b @ a)
    assert not best_b[:, 2:].any() and not best_a[2:].any()
    assert all(not each.any() for each in best_rank(stack([(0 * b, a)]), 2))


def test_columns_that_add_nothing_are_left_out() -> None:
    """A client of rank 1 padded to 2, and one whose B is still 0."""
    b, a = factors(4, D, 2, K)
    padded = (b * torch.tensor([1.0, 0.0]), a * torch.tensor([[1.0], [0.0]]))
    left, right = stack([padded, (0 * b, a), (b, a)])
    assert left.shape == (D, 3) and right.shape == (3, K)
    assert torch.equal(left, torch.cat([b[:, :1], b], dim=1))


def test_a_residual_is_factors_while_they_are_smaller() -> None:
    """d = 7, k = 5: 2 (7 + 5) < 35 < 3 (7 + 5)."""
    assert set(as_residual("m", factors(5, D, 2, K))) == {"m.residual_B", "m.residual_A"}
    product = factors(5, D, 3, K)
    dense = as_residual("m", product)
    assert set(dense) == {"m.residual"} and torch.allclose(dense["m.residual"], (product[0] @ product[1]).float())
    assert as_residual("m", factors(5, D, 0, K)) == {}


@pytest.mark.parametrize("core", [False, True])
def test_the_ideal_is_the_weighted_sum_of_dense_products(core: bool) -> None:
    round_ = random_round(core=core)
    for module in MODULES:
        b, a = ideal(round_, module)
        assert relative((b @ a).numpy(), dense_ideal(round_, module)) < 1e-14


@pytest.mark.parametrize("rule", [rule.name for rule in RULES if not rule.personal])
def test_the_aggregation_error_is_the_dense_one(rule: str) -> None:
    round_ = random_round(core=find_rule(rule).core)
    outcome = aggregate(rule, round_)
    error = aggregation_error(round_, outcome)
    wanted = {module: dense_ideal(round_, module) for module in MODULES}
    missed = {module: dense_made(round_, outcome, module) - wanted[module] for module in MODULES}
    assert error["layers"] == pytest.approx(
        {module: np.linalg.norm(missed[module]) / np.linalg.norm(wanted[module]) for module in MODULES}, abs=1e-14
    )
    everything = [np.concatenate([each[module].ravel() for module in MODULES]) for each in (missed, wanted)]
    assert error["total"] == pytest.approx(np.linalg.norm(everything[0]) / np.linalg.norm(everything[1]), abs=1e-14)


def test_the_error_of_one_client_is_zero_to_the_last_bit_of_float64() -> None:
    round_ = random_round(clients=1)
    assert aggregation_error(round_, fedavg(round_))["total"] < 1e-15


def test_no_error_where_there_is_nothing_to_miss() -> None:
    """Nobody moved B from 0; and a layer that nobody trained keeps its product."""
    round_ = make_round(start(), [update(i, start(), 10) for i in range(2)])
    assert aggregation_error(round_, fedavg(round_)) == {"total": 0.0, "layers": dict.fromkeys(MODULES, 0.0)}
    updates = [update(i, random_adapter(i), 10, active=(1, 0)) for i in range(2)]
    round_ = make_round(random_adapter(9), updates, weighting="activity")
    outcome = fedavg(round_)
    assert aggregation_error(round_, outcome)["layers"][MODULES[1]] < 1e-15
    moved = Outcome({name: 2 * tensor for name, tensor in outcome.adapter.items()})
    assert aggregation_error(round_, moved)["layers"][MODULES[1]] == pytest.approx(3)  # (2 B)(2 A) - B A


def test_the_error_knows_nothing_of_the_order_of_clients() -> None:
    round_ = random_round()
    turned = replace(round_, updates=round_.updates[::-1])
    assert aggregation_error(turned, fedavg(turned)) == aggregation_error(round_, fedavg(round_))
