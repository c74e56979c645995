"""Products against dense matrices, and the aggregation error against its definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation import RULES, find_rule
from copra_fl.aggregation.products import aggregation_error, as_residual, best_rank, frobenius, ideal, modules, stack
from copra_fl.aggregation.rule import Outcome
from copra_fl.aggregation.rules.fedavg import fedavg
from tests.support.rounds import (
    MODULES,
    D,
    K,
    R,
    aggregate,
    dense,
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
def test_the_norm_of_a_product_is_the_norm_of_its_matrix(columns: int) -> None:
    b, a = factors(0, D, columns, K)
    assert frobenius((b, a)) == pytest.approx(float(torch.linalg.matrix_norm(b @ a)), rel=1e-12)


def test_the_norm_of_a_zero_product_is_zero() -> None:
    assert frobenius(stack([(torch.zeros(D, 2).double(), torch.randn(2, K).double())])) == 0.0


def test_equal_products_of_different_factors_differ_by_float64_rounding_only() -> None:
    """B A = (B Q)(Q^T A): a squared norm less twice an inner product would give 1e-8."""
    b, a = factors(0, 300, 8, 200)
    q = torch.linalg.qr(factors(1, 8, 8, 8)[0]).Q
    assert frobenius(stack([(b, a), (-b @ q, q.T @ a)])) / frobenius((b, a)) < 3e-15


def test_a_tiny_difference_is_measured_and_not_rounded_away() -> None:
    b, a = factors(0, 300, 8, 200)
    off_b, off_a = factors(1, 300, 1, 200)
    assert frobenius(stack([(b, a), (1e-10 * off_b, off_a), (-b, a)])) == pytest.approx(
        1e-10 * frobenius((off_b, off_a)), rel=1e-4
    )


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
    assert not any(factor.any() for factor in best_rank(stack([(0 * b, a)]), 2))


def test_columns_that_contribute_nothing_are_dropped() -> None:
    """A client of rank 1 padded to 2, and one whose B is still 0."""
    b, a = factors(4, D, 2, K)
    padded = (b * torch.tensor([1.0, 0.0]), a * torch.tensor([[1.0], [0.0]]))
    left, right = stack([padded, (0 * b, a), (b, a)])
    assert left.shape == (D, 3) and right.shape == (3, K)
    assert torch.equal(left, torch.cat([b[:, :1], b], dim=1))


def test_a_residual_is_in_factors_if_they_are_smaller() -> None:
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
    products = {module: dense_ideal(round_, module) for module in MODULES}
    errors = {module: dense_made(round_, outcome, module) - products[module] for module in MODULES}
    assert error["layers"] == pytest.approx(
        {module: np.linalg.norm(errors[module]) / np.linalg.norm(products[module]) for module in MODULES}, abs=1e-14
    )
    all_errors, all_products = (
        np.concatenate([by_module[module].ravel() for module in MODULES]) for by_module in (errors, products)
    )
    assert error["total"] == pytest.approx(np.linalg.norm(all_errors) / np.linalg.norm(all_products), abs=1e-14)
    all_changes = all_products - np.concatenate([dense(round_.before, module).ravel() for module in MODULES])
    assert error["of_change"] == pytest.approx(np.linalg.norm(all_errors) / np.linalg.norm(all_changes), abs=1e-14)


def test_the_error_of_the_change_by_hand() -> None:
    """s = 1.5, B_i = (2, 0) and (0, 2), A_i alike, A = B = (1, 1) before: FedAvg misses half of each product.

    dW* = 1.5 (diag(4, 4)) / 2 = diag(3, 3), made: 1.5 (1, 1)^T (1, 1), all 1.5: off by 1.5 in 4 places. The product
    before was all 1.5, too: the change is diag(1.5, 1.5) - 1.5 off the diagonal, so the miss is all of the change.
    """
    before: Adapter = {}
    rows = torch.zeros(2, R, K)
    rows[0, 0, 0] = rows[1, 0, 1] = 2.0
    columns = torch.zeros(2, D, R)
    columns[0, 0, 0] = columns[1, 1, 0] = 2.0
    for module in MODULES:
        before |= {f"{module}.lora_A.weight": rows.mean(0), f"{module}.lora_B.weight": columns.mean(0)}
    adapters = [
        {f"{m}.lora_{part}.weight": factor[i] for m in MODULES for part, factor in (("A", rows), ("B", columns))}
        for i in range(2)
    ]
    round_ = make_round(before, [update(i, adapter, 10) for i, adapter in enumerate(adapters)])
    error = aggregation_error(round_, fedavg(round_))
    assert error["of_change"] == pytest.approx(1) and error["total"] == pytest.approx(3 / 18**0.5)


def test_the_error_of_one_client_is_zero_to_the_last_bit_of_float64() -> None:
    round_ = random_round(clients=1)
    assert aggregation_error(round_, fedavg(round_))["total"] < 1e-15


def test_the_error_is_zero_if_the_ideal_product_is_zero_or_unchanged() -> None:
    """No client moved B from 0; and a layer that no client trained keeps its product."""
    round_ = make_round(start(), [update(i, start(), 10) for i in range(2)])
    assert aggregation_error(round_, fedavg(round_)) == {
        "total": 0.0,
        "of_change": 0.0,
        "layers": dict.fromkeys(MODULES, 0.0),
    }
    updates = [update(i, random_adapter(i), 10, active=(1, 0)) for i in range(2)]
    round_ = make_round(random_adapter(9), updates, weighting="activity")
    outcome = fedavg(round_)
    assert aggregation_error(round_, outcome)["layers"][MODULES[1]] < 1e-15
    moved = Outcome({name: 2 * tensor for name, tensor in outcome.adapter.items()})
    assert aggregation_error(round_, moved)["layers"][MODULES[1]] == pytest.approx(3)  # (2 B)(2 A) - B A


def test_the_error_does_not_depend_on_the_order_of_clients() -> None:
    round_ = random_round()
    reversed_round = replace(round_, updates=round_.updates[::-1])
    assert aggregation_error(reversed_round, fedavg(reversed_round)) == aggregation_error(round_, fedavg(round_))
