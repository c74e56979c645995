"""Each rule on two clients of rank 1 against results worked out by hand, and rules against hostile clients.

n = 10, 30, so p = 1/4, 3/4;  d = 2, k = 3, s = 2
B_0 = [1, 0]^T, A_0 = [1, 2, 0];    B_1 = [0, 2]^T, A_1 = [0, 2, 4]
averages          B = [1/4, 3/2]^T, A = [1/4, 2, 3]
dW* / s           [[1/4, 1/2, 0], [0, 3, 6]]
B A               [[1/16, 1/2, 3/4], [3/8, 3, 9/2]]
dW* / s - B A     [[3/16, 0, -3/4], [-3/8, 0, 3/2]]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from copra_fl.adapters.state import Adapter, Update, difference, norm
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.products import aggregation_error
from copra_fl.aggregation.rule import Round
from copra_fl.aggregation.rules.fedrot_lora import rotation
from copra_fl.aggregation.rules.fedrpca import low_rank_part
from copra_fl.aggregation.rules.fedsvd import orthogonalized
from tests.support.rounds import (
    MODULES,
    D,
    R,
    S,
    aggregate,
    dense,
    dense_ideal,
    dense_made,
    make_round,
    random_adapter,
    random_round,
    relative,
    update,
)

M = MODULES[0]
A, B, CORE, RESIDUAL = f"{M}.lora_A.weight", f"{M}.lora_B.weight", f"{M}.lora_R.weight", f"{M}.residual"


def lora(b: list[float], a: list[float], head: float = 0.0) -> Adapter:
    """Return an adapter of rank 1 with B (2, 1) and A (1, 3)."""
    return {A: torch.tensor([a]).float(), B: torch.tensor([b]).float().T, "head.bias": torch.tensor([head]).float()}


BEFORE = lora([0, 0], [1, 1, 1])
CLIENTS = [lora([1, 0], [1, 2, 0], head=4), lora([0, 2], [0, 2, 4], head=8)]


def two_clients(before: Adapter = BEFORE, clients: list[Adapter] = CLIENTS, **settings: float) -> Round:
    """Return a round with n = 10, 30, in which a fresh adapter has A = [7, 7, 7]."""
    updates = [update(i, adapter, 10 + 20 * i) for i, adapter in enumerate(clients)]
    drawn = {name: tensor for name, tensor in lora([0, 0], [7, 7, 7]).items() if name != "head.bias"}
    return make_round(before, updates, scaling=2.0, fresh=lambda: drawn, **settings)


def values(tensor: torch.Tensor) -> list[float]:
    return pytest.approx(tensor.flatten().tolist(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("rule", ["fedavg", "ffa-lora", "rolora", "fedsa-lora", "zero-pad"])
def test_averages_of_a_and_b(rule: str) -> None:
    adapter = aggregate(rule, two_clients()).adapter
    assert values(adapter[B]) == [0.25, 1.5] and values(adapter[A]) == [0.25, 2, 3]
    assert values(adapter["head.bias"]) == [7.0]


def test_the_error_of_fedavg() -> None:
    """Squares: (3/16)^2 (1 + 16) (1 + 4) = 2.98828125 of 1/16 + 1/4 + 9 + 36 = 45.3125."""
    round_ = two_clients()
    error = aggregation_error(round_, aggregate("fedavg", round_))
    assert error["total"] == error["layers"][M] == pytest.approx((2.98828125 / 45.3125) ** 0.5, rel=1e-7)


def test_zero_pad_of_unequal_ranks() -> None:
    """Rank 3; clients of rank 1 and 2 with p = 1/4, 3/4. Row 1 is client 1's and shrinks; row 2 is unchanged."""
    before = {A: torch.full((3, 1), 5.0), B: torch.zeros(2, 3)}
    first = {A: torch.tensor([[4.0], [0], [0]]), B: torch.tensor([[4.0, 0, 0], [8, 0, 0]])}
    second = {A: torch.tensor([[8.0], [4], [0]]), B: torch.tensor([[0.0, 4, 0], [0, 8, 0]])}
    round_ = make_round(before, [update(0, first, 10), update(1, second, 30)], ranks={0: 1, 1: 2})
    adapter = aggregate("zero-pad", round_).adapter
    assert adapter[A].tolist() == [[7.0], [3.0], [5.0]]
    assert adapter[B].tolist() == [[1.0, 3.0, 0.0], [2.0, 6.0, 0.0]]


def test_hetlora_weighs_by_norms_of_products() -> None:
    """||B_0 A_0|| = sqrt(5), ||B_1 A_1|| = 2 sqrt(20): p = 1/5, 4/5 whatever the examples; the head by examples."""
    outcome = aggregate("hetlora", two_clients())
    assert values(outcome.adapter[B]) == [0.2, 1.6] and values(outcome.adapter[A]) == [0.2, 2, 3.2]
    assert values(outcome.adapter["head.bias"]) == [7.0]
    assert outcome.notes["norms"] == pytest.approx([2 * 5**0.5, 8 * 5**0.5])


def test_flora_stacks() -> None:
    outcome = aggregate("flora", two_clients())
    assert values(outcome.residual[RESIDUAL]) == [0.5, 1, 0, 0, 6, 12]
    assert values(outcome.adapter[A]) == [7.0, 7, 7] and values(outcome.adapter[B]) == [0.0, 0]
    assert values(outcome.adapter["head.bias"]) == [7.0]


def test_flora_stacks_real_ranks_with_the_weights_in_b() -> None:
    """d = k = 40; ranks 1 and 2 in a global rank of 8: 3 columns, s p_1 = 1.5 * 1/4 in the first."""
    updates = []
    for i, rank in enumerate((1, 2)):
        adapter = random_adapter(i, rank=8, d=40, k=40)
        adapter = {n: t[:rank] if "_A." in n else t[:, :rank] if "_B." in n else t for n, t in adapter.items()}
        padded = {
            n: torch.nn.functional.pad(t, (0, 0, 0, 8 - rank) if "_A." in n else (0, 8 - rank)) if "lora" in n else t
            for n, t in adapter.items()
        }
        updates.append(update(i, padded, 10 + 20 * i))
    before = {n: torch.zeros_like(t) if "_B." in n else t for n, t in random_adapter(5, rank=8, d=40, k=40).items()}
    drawn = {n: t for n, t in before.items() if "lora" in n}
    residual = aggregate("flora", make_round(before, updates, ranks={0: 1, 1: 2}, fresh=lambda: drawn)).residual
    left, right = residual[f"{M}.residual_B"], residual[f"{M}.residual_A"]
    assert left.shape == (40, 3) and right.shape == (3, 40)
    assert torch.allclose(left[:, 0], 0.375 * updates[0].adapter[B][:, 0])
    assert torch.equal(right[1:], updates[1].adapter[A][:2])


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 1.0])
def test_florist_keeps_the_leading_part_of_flora_that_has_the_energy(threshold: float) -> None:
    """Oracle: numpy's SVD of the dense average, singular value after singular value until the energy is reached."""
    round_ = random_round(3)
    outcome = aggregate("florist", round_, threshold=threshold)
    assert all(torch.equal(outcome.adapter[n], t) for n, t in aggregate("flora", round_).adapter.items())
    for module in MODULES:
        dense = dense_ideal(round_, module)
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
        rank = 1
        while sum(s[:rank] ** 2) < threshold * sum(s[: len(s)] ** 2) * (1 - 1e-12):
            rank += 1
        assert outcome.notes["ranks"][module] == rank
        made = dense_made(round_, outcome, module)
        assert np.allclose(made, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-5)
        assert np.linalg.matrix_rank(made, tol=1e-4) == rank


def test_florist_sends_factors_of_the_cut_rank() -> None:
    """d = 40, k = 30; the second singular value of each client is 100 times smaller: 3 columns of 6."""
    updates = []
    for i in range(3):
        adapter = random_adapter(i, d=40, k=30)
        updates.append(update(i, {n: t * torch.tensor([1, 0.01]) if "_B." in n else t for n, t in adapter.items()}, 10))
    residual = aggregate("florist", make_round(random_adapter(9, d=40, k=30), updates), threshold=0.999).residual
    assert residual[f"{RESIDUAL}_B"].shape == (40, 3) and residual[f"{RESIDUAL}_A"].shape == (3, 30)


def test_flexlora_is_the_truncated_svd() -> None:
    """dW* / s = [[1/4, 1/2, 0], [0, 3, 6]] by numpy; B and A have the same length."""
    adapter = aggregate("flexlora", two_clients()).adapter
    u, s, vt = np.linalg.svd([[0.25, 0.5, 0], [0, 3, 6]])
    assert (s[0] * np.outer(u[:, 0], vt[0])).ravel().tolist() == values(adapter[B] @ adapter[A])
    assert float(adapter[B].norm()) == pytest.approx(float(adapter[A].norm())) == pytest.approx(s[0] ** 0.5)
    assert adapter[B].flatten()[1] > 0
    assert values(adapter["head.bias"]) == [7.0]


def test_fedex_adds_its_error_to_w0() -> None:
    outcome = aggregate("fedex-lora", two_clients())
    assert values(outcome.adapter[B]) == [0.25, 1.5] and values(outcome.adapter[A]) == [0.25, 2, 3]
    left, right = outcome.residual[f"{RESIDUAL}_B"], outcome.residual[f"{RESIDUAL}_A"]
    assert left.shape == (2, 1)  # (K - 1) r
    assert values(left @ right) == [0.375, 0, -1.5, -0.75, 0, 3]


def test_fedex_residual_has_rank_of_all_clients_but_one() -> None:
    """K = 4 of rank 2: 6 columns in 40 x 30."""
    updates = [update(i, random_adapter(i, d=40, k=30), 10 + i) for i in range(4)]
    residual = aggregate("fedex-lora", make_round(random_adapter(9, d=40, k=30), updates)).residual
    assert residual[f"{RESIDUAL}_B"].shape == (40, 6) and residual[f"{RESIDUAL}_A"].shape == (6, 30)


def test_lora_fair_corrects_b() -> None:
    """A A^T = 1/16 + 4 + 9 = 209/16 = m; (dW* / s - B A) A^T = [-141/64, 141/32]; over 1.25 m for lambda = 1/4."""
    adapter = aggregate("lora-fair", two_clients(), regularization=0.25).adapter
    correction = 141 / 64 / (1.25 * 209 / 16)
    assert [0.25 - correction, 1.5 + 2 * correction] == values(adapter[B])
    assert values(adapter[A]) == [0.25, 2, 3]


def test_lora_fair_without_regularization_is_least_squares() -> None:
    """With the average A, no B is closer to the ideal: numpy's lstsq of A^T B^T = (dW* / s)^T, at rank 2."""
    updates = [update(i, random_adapter(i), 10) for i in range(3)]
    adapter = aggregate("lora-fair", make_round(random_adapter(9), updates), regularization=1e-12).adapter
    clients = [{name: tensor.double().numpy() for name, tensor in update.adapter.items()} for update in updates]
    ideal, average = sum(client[B] @ client[A] for client in clients) / 3, sum(client[A] for client in clients) / 3
    best = np.linalg.lstsq(average.T, ideal.T, rcond=None)[0].T
    assert np.allclose(adapter[B].numpy(), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("regularization", [1e-4, 0.01, 1.0])
def test_lora_fair_by_cosine_minimizes_the_objective_of_the_paper(regularization: float) -> None:
    """Oracle: torch's L-BFGS on 1 - cos(dW*, (B + dB) A) + lambda ||dB||^2, as dense matrices."""
    round_ = random_round(4)
    b, a = (aggregate("fedavg", round_).adapter[name].double() for name in (B, A))
    ideal = torch.from_numpy(dense_ideal(round_, M))
    change = torch.zeros_like(b, requires_grad=True)
    solver = torch.optim.LBFGS([change], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        cosine = torch.cosine_similarity(((b + change) @ a).flatten(), ideal.flatten(), dim=0)
        value = 1 - cosine + regularization * change.square().sum()
        value.backward()
        return value

    solver.step(loss)
    adapter = aggregate("lora-fair", round_, similarity="cosine", regularization=regularization).adapter
    assert torch.allclose(adapter[B].double(), (b + change).detach(), atol=1e-5)
    assert values(adapter[A]) == a.flatten().tolist()


def test_fedrot_turns_signs_back() -> None:
    """Rank 1: Q = -1 for client 1, whose factors are both negated. B_ref = [1, 1], A_ref = [1, 1, 1]."""
    round_ = two_clients(lora([1, 1], [1, 1, 1]), [CLIENTS[0], lora([0, -2], [0, -2, -4], head=8)])
    adapter = aggregate("fedrot-lora", round_).adapter
    assert values(adapter[B]) == [0.25, 1.5] and values(adapter[A]) == [0.25, 2, 3]
    cancelled = aggregate("fedavg", round_).adapter
    assert values(cancelled[B]) == [0.25, -1.5]


def test_fedrot_aligns_by_both_factors() -> None:
    """Rank 1: A alone would give Q = 1, B alone Q = -1; B is larger: 4 * -2 + 1 * 3 < 0, so Q = -1."""
    b, a, b_ref, a_ref = (torch.tensor(x).double() for x in ([[-2.0]], [[1.0, 1, 1]], [[4.0]], [[1.0, 1, 1]]))
    assert rotation(b, a, b_ref, a_ref).item() == pytest.approx(-1)
    assert rotation(b / 4, a, b_ref, a_ref).item() == pytest.approx(1)


@pytest.mark.parametrize("first_round", [True, False])
def test_fedrot_undoes_rotations(first_round: bool) -> None:
    """Five clients with the same product in randomly rotated factors: fedavg loses most of it, fedrot nothing."""
    truth = random_adapter(1, rank=4, d=30, k=20)
    before = {name: torch.zeros_like(t) if first_round and "_B." in name else t for name, t in truth.items()}
    updates = []
    for i in range(5):
        q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(i))).Q
        turned = {n: q.T @ t if "_A." in n else t @ q if "_B." in n else t for n, t in truth.items()}
        updates.append(update(i, turned, 10 + i))
    round_ = make_round(before, updates)
    error = {rule: aggregation_error(round_, aggregate(rule, round_))["total"] for rule in ("fedavg", "fedrot-lora")}
    assert error["fedavg"] > 0.7 and error["fedrot-lora"] < 1e-6


def test_fedrpca_scales_what_only_one_client_has_learnt() -> None:
    """Five clients change each value by 1, and client 2 changes one value by 9 more: 1 + beta 9 / 5 there, else 1."""
    before = {A: torch.full((4, 10), 0.5), B: torch.zeros(6, 4)}
    changed = [{name: old + 1 for name, old in before.items()} for _ in range(5)]
    changed[2][A][1, 3] += 9
    round_ = make_round(before, [update(i, adapter, 10) for i, adapter in enumerate(changed)])
    expected = torch.full((4, 10), 1.5)
    for beta in (1.0, 2.0, 3.0):
        expected[1, 3] = 1.5 + beta * 9 / 5
        adapter = aggregate("fedrpca", round_, beta=beta).adapter
        assert torch.allclose(adapter[A], expected, atol=1e-3)
        assert torch.allclose(adapter[B], torch.ones(6, 4), atol=1e-4)


def test_fedrpca_with_beta_1_is_fedavg() -> None:
    round_ = random_round(4)
    ours, average = (aggregate(rule, round_, **p).adapter for rule, p in (("fedrpca", {"beta": 1.0}), ("fedavg", {})))
    assert all(torch.allclose(ours[name], tensor, atol=1e-6) for name, tensor in average.items())


def inexact_augmented_lagrangian(matrix: np.ndarray, sparsity: float) -> np.ndarray:
    """Return L of matrix = L + S by another algorithm, with a growing step (Lin et al., arXiv 1009.5055)."""
    top = np.linalg.norm(matrix, 2)
    dual = matrix / max(top, np.abs(matrix).max() / sparsity)
    sparse, mu = np.zeros_like(matrix), 0.125 / top
    for _ in range(400):
        u, values, vt = np.linalg.svd(matrix - sparse + dual / mu, full_matrices=False)
        low_rank = u * np.maximum(values - 1 / mu, 0) @ vt
        rest = matrix - low_rank + dual / mu
        sparse = np.sign(rest) * np.maximum(np.abs(rest) - sparsity / mu, 0)
        dual, mu = dual + mu * (matrix - low_rank - sparse), 1.02 * mu
    return low_rank


@pytest.mark.parametrize("columns", [3, 8])
def test_robust_pca_agrees_with_another_algorithm_and_no_other_split_is_better(columns: int) -> None:
    """The objective is convex, so no small step from its minimum lowers it."""
    rng = np.random.default_rng(columns)
    matrix = 1e-3 * (2 * rng.normal(size=(40, 1)) @ rng.normal(size=(1, columns)) + rng.standard_t(2, (40, columns)))
    ours, sparsity = low_rank_part(matrix), 40**-0.5

    def objective(low_rank: np.ndarray) -> float:
        return np.linalg.norm(low_rank, "nuc") + sparsity * np.abs(matrix - low_rank).sum()

    other = inexact_augmented_lagrangian(matrix, sparsity)
    assert np.linalg.norm(ours - other) < 5e-3 * np.linalg.norm(other)
    assert objective(ours) < objective(other) * (1 + 1e-4)
    for size in (1e-5, 1e-4, 1e-3):
        assert objective(ours) < objective(ours + size * rng.normal(size=matrix.shape)) * (1 + 1e-6)
    assert objective(ours) < min(objective(matrix), objective(np.zeros_like(matrix)))


def test_robust_pca_recovers_a_low_rank_and_a_sparse_matrix() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 30))
    sparse = np.where(rng.random(truth.shape) < 0.05, rng.normal(scale=5, size=truth.shape), 0)
    assert np.linalg.norm(low_rank_part(truth + sparse) - truth) < 1e-3 * np.linalg.norm(truth)


def test_fed_sb_averages_r() -> None:
    """R = 1/4 * 1 + 3/4 * 5 = 4; the product 2 * 4 B A is the average of 2 B A and 10 B A."""
    fixed = lora([1, 2], [1, 0, 1])
    clients = [fixed | {CORE: torch.tensor([[r]])} for r in (1.0, 5.0)]
    round_ = two_clients(fixed | {CORE: torch.zeros(1, 1)}, clients)
    outcome = aggregate("fed-sb", round_)
    assert outcome.adapter[CORE].item() == 4.0 and torch.equal(outcome.adapter[B], fixed[B])
    assert aggregation_error(round_, outcome)["total"] < 1e-15
    assert find_rule("fed-sb").trains(1) == {"R", "head"} and find_rule("fed-sb").core


def scalars(before: float, changed: list[float], examples: int = 10, **settings: float) -> Round:
    """Return a round of clients with a single number as adapter, the head's bias."""
    updates = [
        Update(i, {"head.bias": torch.tensor([x])}, examples + i, (1,), {"loss": 1.0}) for i, x in enumerate(changed)
    ]
    return make_round({"head.bias": torch.tensor([before])}, updates, **settings)


def test_trimmed_mean_drops_a_share_at_each_end() -> None:
    """A fifth of five is one: (2 + 3 + 7) / 3; a tenth is none."""
    changed = [3.0, -100.0, 7.0, 1000.0, 2.0]
    assert aggregate("trimmed-mean", scalars(0.0, changed)).adapter["head.bias"].item() == 4.0
    everyone = aggregate("trimmed-mean", scalars(0.0, changed), trim_fraction=0.1).adapter["head.bias"].item()
    assert everyone == pytest.approx(912 / 5)


def test_median_of_odd_and_even() -> None:
    assert aggregate("median", scalars(0.0, [3.0, -100.0, 7.0, 1000.0, 2.0])).adapter["head.bias"].item() == 3.0
    assert aggregate("median", scalars(0.0, [3.0, -100.0, 7.0, 1000.0])).adapter["head.bias"].item() == 5.0


@pytest.mark.parametrize("weighting", ["examples", "activity"])
def test_only_clients_that_trained_a_layer_count_in_a_median_and_a_trimmed_mean(weighting: str) -> None:
    """A majority of three never trained it, and does not hold it still."""
    before = lora([1, 1], [1, 1, 1])
    updates = [update(i, lora([2, 2 + i], [3, 3, 3 + i]), 10, active=(int(i < 2), 1)) for i in range(5)]
    for rule, parameters in (("median", {}), ("trimmed-mean", {"trim_fraction": 0.0})):
        adapter = aggregate(rule, make_round(before, updates, weighting=weighting), **parameters).adapter
        assert values(adapter[B]) == [2.0, 2.5] and values(adapter[A]) == [3.0, 3, 3.5]


@pytest.mark.parametrize(
    ("rule", "parameters", "center"),
    [
        ("median-product", {}, lambda products: np.median(products, axis=0)),
        ("trimmed-mean-product", {"trim_fraction": 0.3}, lambda products: scipy.stats.trim_mean(products, 0.3, axis=0)),
    ],
)
def test_a_median_and_a_trimmed_mean_of_products(rule: str, parameters: dict[str, float], center: Callable) -> None:
    """Oracle: numpy and scipy on dense products, and the first r terms of numpy's SVD."""
    round_ = random_round(5)
    outcome = aggregate(rule, round_, **parameters)
    for module in MODULES:
        u, s, vt = np.linalg.svd(center(np.stack([dense(update.adapter, module) for update in round_.updates])))
        assert relative(dense_made(round_, outcome, module), (u[:, :R] * s[:R]) @ vt[:R]) < 1e-6
    of_factors = aggregate(rule.removesuffix("-product"), round_, **parameters)
    assert torch.equal(outcome.adapter["head.weight"], of_factors.adapter["head.weight"])


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_equal_products_of_different_factors_count_as_equal(rule: str) -> None:
    """Three clients have factors (B Q, Q^T A) of one product, two are hostile: the result is the majority's product."""
    honest = random_adapter(0)
    updates = [update(i, random_adapter(i, d=D), 10) for i in (3, 4)]
    for i in range(3):
        q = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(i))).Q
        turned = {
            name: tensor @ q if ".lora_B." in name else q.T @ tensor if ".lora_A." in name else tensor
            for name, tensor in honest.items()
        }
        updates.append(update(i, turned, 10))
    round_ = make_round(random_adapter(9), updates)
    parameters = {"trim_fraction": 0.4} if rule == "trimmed-mean" else {}
    of_factors, of_products = (aggregate(name, round_, **parameters) for name in (rule, f"{rule}-product"))
    for module in MODULES:
        assert relative(dense_made(round_, of_products, module), dense(honest, module)) < 1e-6
        assert relative(dense_made(round_, of_factors, module), dense(honest, module)) > 0.1


def test_fedsvd_has_an_a_with_orthonormal_rows_in_the_old_row_space() -> None:
    """Oracle: numpy's SVD of the dense product of A with the average of the B's."""
    before = random_adapter(9)
    shared = {name: tensor for name, tensor in before.items() if ".lora_A." in name}
    round_ = make_round(before, [update(i, random_adapter(i) | shared, 10 + 20 * i) for i in range(2)])
    adapter = aggregate("fedsvd", round_).adapter
    for module in MODULES:
        b, a = (adapter[f"{module}.lora_{part}.weight"].double().numpy() for part in "BA")
        old_a = before[f"{module}.lora_A.weight"].double().numpy()
        u, s, vt = np.linalg.svd(dense_ideal(round_, module) / S)
        assert a @ a.T == pytest.approx(np.eye(R), abs=1e-6)
        assert np.abs(np.diag(a @ vt[:R].T)) == pytest.approx([1, 1], abs=1e-6), "the right singular vectors"
        assert np.linalg.norm(b, axis=0) == pytest.approx(s[:R]) and s[R:] == pytest.approx(0, abs=1e-6)
        assert a @ np.linalg.pinv(old_a) @ old_a == pytest.approx(a, abs=1e-6), "the row space of the old A"


def test_fedsvd_keeps_the_product_where_the_rank_is_above_the_width_of_a_module() -> None:
    factors = {
        f"{MODULES[0]}.lora_A.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
        f"{MODULES[0]}.lora_B.weight": torch.randn(4, 7, generator=torch.Generator().manual_seed(1)),
    }
    refactored = orthogonalized(factors, [MODULES[0]])
    assert {name: tensor.shape for name, tensor in refactored.items()} == {n: t.shape for n, t in factors.items()}
    (a, b), (old_a, old_b) = refactored.values(), factors.values()
    torch.testing.assert_close(b @ a, old_b @ old_a)


def test_norm_clipped_by_hand() -> None:
    """Changes (3, 4) and (0, 20) of lengths 5 and 20 from (1, 1); c = 10: (0, 20) becomes (0, 10); p = 1/4, 3/4."""
    before = {"head.bias": torch.tensor([1.0, 1.0])}
    sent = [torch.tensor([4.0, 5.0]), torch.tensor([1.0, 21.0])]
    updates = [Update(i, {"head.bias": x}, 10 + 20 * i, (1, 1), {"loss": 1.0}) for i, x in enumerate(sent)]
    outcome = aggregate("norm-clipped", make_round(before, updates), clip_norm=10.0)
    assert values(outcome.adapter["head.bias"]) == [1.75, 1 + 1 + 7.5]
    assert outcome.notes == {"clip_norm": 10.0, "norms": [5.0, 20.0]}
    by_median = aggregate("norm-clipped", make_round(before, updates))  # 12.5
    assert by_median.notes["clip_norm"] == 12.5
    assert values(by_median.adapter["head.bias"]) == [1.75, 1 + 1 + 0.75 * 12.5]
    idle = [Update(i, before, 10, (0, 0), {"loss": 1.0}) for i in range(2, 6)]
    assert aggregate("norm-clipped", make_round(before, updates + idle)).notes["clip_norm"] == 12.5
    assert aggregate("norm-clipped", make_round(before, idle)).adapter["head.bias"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "norm-clipped", "fedavg"])
@pytest.mark.parametrize("factor", [100.0, -100.0])
def test_one_hostile_client_in_five(rule: str, factor: float) -> None:
    """Four clients take nearly the same step; the fifth sends 100 times that step, or -100 times."""
    before, goal = random_adapter(1), random_adapter(2)
    step = difference(goal, before)
    updates = []
    for i in range(5):
        noise, share = random_adapter(10 + i), factor if i == 4 else 1.0
        sent = {name: old + share * step[name] + 0.05 * noise[name] for name, old in before.items()}
        updates.append(update(i, sent, 10))
    remaining = norm(difference(goal, aggregate(rule, make_round(before, updates)).adapter)) / norm(step)
    assert remaining > 10 if rule == "fedavg" else remaining < 0.5
