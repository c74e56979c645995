"""Each rule on two clients of rank 1 whose answer is worked out by hand, and hostile clients.

n = 10, 30, so p = 1/4, 3/4;  d = 2, k = 3, s = 2
B_0 = [1, 0]^T, A_0 = [1, 2, 0];    B_1 = [0, 2]^T, A_1 = [0, 2, 4]
averages          B = [1/4, 3/2]^T, A = [1/4, 2, 3]
dW* / s           [[1/4, 1/2, 0], [0, 3, 6]]
B A               [[1/16, 1/2, 3/4], [3/8, 3, 9/2]]
dW* / s - B A     [[3/16, 0, -3/4], [-3/8, 0, 3/2]]
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from copra_fl.adapters.state import Adapter, Update, difference, norm
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.products import aggregation_error
from copra_fl.aggregation.rule import Round
from copra_fl.aggregation.rules.fedrot_lora import rotation
from tests.support.rounds import MODULES, aggregate, make_round, random_adapter, update

M = MODULES[0]
A, B, CORE, RESIDUAL = f"{M}.lora_A.weight", f"{M}.lora_B.weight", f"{M}.lora_R.weight", f"{M}.residual"


def lora(b: list[float], a: list[float], head: float = 0.0) -> Adapter:
    """Rank 1: B (2, 1) and A (1, 3)."""
    return {A: torch.tensor([a]).float(), B: torch.tensor([b]).float().T, "head.bias": torch.tensor([head]).float()}


BEFORE = lora([0, 0], [1, 1, 1])
CLIENTS = [lora([1, 0], [1, 2, 0], head=4), lora([0, 2], [0, 2, 4], head=8)]


def two_clients(before: Adapter = BEFORE, clients: list[Adapter] = CLIENTS, **settings: float) -> Round:
    """n = 10, 30; a fresh adapter has A = [7, 7, 7]."""
    updates = [update(i, adapter, 10 + 20 * i) for i, adapter in enumerate(clients)]
    drawn = {name: tensor for name, tensor in lora([0, 0], [7, 7, 7]).items() if name != "head.bias"}
    return make_round(before, updates, scaling=2.0, fresh=lambda: drawn, **settings)


def values(tensor: torch.Tensor) -> list[float]:
    return pytest.approx(tensor.flatten().tolist(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("rule", ["fedavg", "ffa-lora", "rolora", "fedsa-lora", "zero-pad"])
def test_factors_averaged_apart(rule: str) -> None:
    adapter = aggregate(rule, two_clients()).adapter
    assert values(adapter[B]) == [0.25, 1.5] and values(adapter[A]) == [0.25, 2, 3]
    assert values(adapter["head.bias"]) == [7.0]


def test_the_error_of_fedavg() -> None:
    """Squares: (3/16)^2 (1 + 16) (1 + 4) = 2.98828125 of 1/16 + 1/4 + 9 + 36 = 45.3125."""
    round_ = two_clients()
    error = aggregation_error(round_, aggregate("fedavg", round_))
    assert error["total"] == error["layers"][M] == pytest.approx((2.98828125 / 45.3125) ** 0.5, rel=1e-7)


def test_zero_pad_of_unequal_ranks() -> None:
    """Rank 3; clients of rank 1 and 2 with p = 1/4, 3/4. Row 1 is client 1's alone and shrinks; row 2 is the old."""
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


def test_flexlora_is_the_truncated_svd() -> None:
    """dW* / s = [[1/4, 1/2, 0], [0, 3, 6]] by numpy; B and A have the same length."""
    adapter = aggregate("flexlora", two_clients()).adapter
    u, s, vt = np.linalg.svd([[0.25, 0.5, 0], [0, 3, 6]])
    assert (s[0] * np.outer(u[:, 0], vt[0])).ravel().tolist() == values(adapter[B] @ adapter[A])
    assert float(adapter[B].norm()) == pytest.approx(float(adapter[A].norm())) == pytest.approx(s[0] ** 0.5)
    assert adapter[B].flatten()[1] > 0
    assert values(adapter["head.bias"]) == [7.0]


def test_fedex_puts_the_rest_into_w0() -> None:
    outcome = aggregate("fedex-lora", two_clients())
    assert values(outcome.adapter[B]) == [0.25, 1.5] and values(outcome.adapter[A]) == [0.25, 2, 3]
    left, right = outcome.residual[f"{RESIDUAL}_B"], outcome.residual[f"{RESIDUAL}_A"]
    assert left.shape == (2, 1)  # (K - 1) r
    assert values(left @ right) == [0.375, 0, -1.5, -0.75, 0, 3]


def test_fedex_needs_one_client_less_than_there_are() -> None:
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


def test_lora_fair_without_lambda_is_least_squares() -> None:
    """Of all B beside the average A, none comes closer: numpy's lstsq of A^T B^T = (dW* / s)^T, at rank 2."""
    updates = [update(i, random_adapter(i), 10) for i in range(3)]
    adapter = aggregate("lora-fair", make_round(random_adapter(9), updates), regularization=1e-12).adapter
    clients = [{name: tensor.double().numpy() for name, tensor in each.adapter.items()} for each in updates]
    ideal, average = sum(each[B] @ each[A] for each in clients) / 3, sum(each[A] for each in clients) / 3
    best = np.linalg.lstsq(average.T, ideal.T, rcond=None)[0].T
    assert np.allclose(adapter[B].numpy(), best, rtol=1e-5, atol=1e-6)


def test_fedrot_turns_signs_back() -> None:
    """Rank 1: Q = -1 for client 1, whose factors are both negated. B_ref = [1, 1], A_ref = [1, 1, 1]."""
    round_ = two_clients(lora([1, 1], [1, 1, 1]), [CLIENTS[0], lora([0, -2], [0, -2, -4], head=8)])
    adapter = aggregate("fedrot-lora", round_).adapter
    assert values(adapter[B]) == [0.25, 1.5] and values(adapter[A]) == [0.25, 2, 3]
    cancelled = aggregate("fedavg", round_).adapter
    assert values(cancelled[B]) == [0.25, -1.5]


def test_fedrot_looks_at_both_factors() -> None:
    """Rank 1: A says +, B says - and is larger: 4 * -2 + 1 * 3 < 0."""
    b, a, b_ref, a_ref = (torch.tensor(x).double() for x in ([[-2.0]], [[1.0, 1, 1]], [[4.0]], [[1.0, 1, 1]]))
    assert rotation(b, a, b_ref, a_ref).item() == pytest.approx(-1)
    assert rotation(b / 4, a, b_ref, a_ref).item() == pytest.approx(1)


@pytest.mark.parametrize("first_round", [True, False])
def test_fedrot_undoes_rotations(first_round: bool) -> None:
    """Five clients with one product, each in factors turned at random: fedavg loses most of it, fedrot nothing."""
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


def test_fed_sb_averages_the_core() -> None:
    """R = 1/4 * 1 + 3/4 * 5 = 4; the product 2 * 4 B A is the average of 2 B A and 10 B A."""
    fixed = lora([1, 2], [1, 0, 1])
    clients = [fixed | {CORE: torch.tensor([[r]])} for r in (1.0, 5.0)]
    round_ = two_clients(fixed | {CORE: torch.zeros(1, 1)}, clients)
    outcome = aggregate("fed-sb", round_)
    assert outcome.adapter[CORE].item() == 4.0 and torch.equal(outcome.adapter[B], fixed[B])
    assert aggregation_error(round_, outcome)["total"] < 1e-15
    assert find_rule("fed-sb").trains(1) == {"R", "head"} and find_rule("fed-sb").core


def scalars(before: float, changed: list[float], examples: int = 10, **settings: float) -> Round:
    """Clients whose adapter is one number, the head's bias."""
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


def test_median_and_trimmed_mean_leave_out_who_weighs_nothing() -> None:
    """By activity the three clients that never trained the layer have no say; by examples they are for the old."""
    before = lora([1, 1], [1, 1, 1])
    updates = [update(i, lora([2, 2 + i], [3, 3, 3 + i]), 10, active=(int(i < 2), 1)) for i in range(5)]
    for rule, parameters in (("median", {}), ("trimmed-mean", {"trim_fraction": 0.0})):
        by_activity = aggregate(rule, make_round(before, updates, weighting="activity"), **parameters).adapter
        assert values(by_activity[B]) == [2.0, 2.5] and values(by_activity[A]) == [3.0, 3, 3.5]
    assert torch.equal(aggregate("median", make_round(before, updates)).adapter[B], before[B])


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


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "norm-clipped", "fedavg"])
@pytest.mark.parametrize("factor", [100.0, -100.0])
def test_one_hostile_client_in_five(rule: str, factor: float) -> None:
    """Four clients take nearly the same step; the fifth sends 100 times as much, or as much the other way."""
    before, goal = random_adapter(1), random_adapter(2)
    step = difference(goal, before)
    updates = []
    for i in range(5):
        noise, share = random_adapter(10 + i), factor if i == 4 else 1.0
        sent = {name: old + share * step[name] + 0.05 * noise[name] for name, old in before.items()}
        updates.append(update(i, sent, 10))
    left = norm(difference(goal, aggregate(rule, make_round(before, updates)).adapter)) / norm(step)
    assert left > 10 if rule == "fedavg" else left < 0.5
