"""Client-level differential privacy: accounting against closed forms, clipping and noise by hand, whole runs."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from flwr.serverapp import Grid
from scipy.optimize import brentq
from scipy.special import comb
from scipy.stats import kstest
from scipy.stats import norm as normal

from copra_fl.adapters.state import difference, norm, parts
from copra_fl.aggregation import RULES, Rule
from copra_fl.aggregation.accounting import Release, epsilon
from copra_fl.aggregation.private import STEPS, clip, private_average
from copra_fl.aggregation.rule import ALL
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.aggregation.secret_random import normals, uniforms
from copra_fl.config import Config, ConfigError, PrivacyConfig
from copra_fl.files import DamagedFile
from server import federation
from server.privacy_budget import PrivacyBudget, read_ledger
from server.rounds import RoundEvaluation
from server.sampling import sample
from server.strategy import CohortStrategy
from tests.support.compatibility import check
from tests.support.federations import Stop, StoppingGrid, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.rounds import make_round, random_adapter, random_round, update
from tests.support.tiny import Settings


def gaussian_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return epsilon of composed Gaussian mechanisms without sampling (Balle and Wang, arXiv 1805.06530, theorem 8).

    delta(e) = P(1 / (2 s) - e s) - exp(e) P(-1 / (2 s) - e s), with s = z / sqrt(T) and P the normal distribution.
    """
    s = noise_multiplier / math.sqrt(rounds)
    return brentq(lambda e: normal.cdf(0.5 / s - e * s) - math.exp(e) * normal.cdf(-0.5 / s - e * s) - delta, 0, 500)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(1.0, 1, 1e-5), (0.8, 3, 1e-5), (4.0, 50, 1e-6)])
def test_without_sampling_epsilon_is_the_closed_form(z: float, rounds: int, delta: float) -> None:
    assert epsilon([Release(1.0, z)] * rounds, delta) == pytest.approx(gaussian_epsilon(z, rounds, delta), rel=2e-3)


def one_round_delta(q: float, z: float, epsilon: float) -> float:
    """Return delta of one round with a Poisson sample, by numerical integration over the outcome of the sum.

    With the client the outcome is (1 - q) N(0, z^2) + q N(1, z^2), without it N(0, z^2); the worse of both directions.
    """
    x = np.linspace(-40 * z, 40 * z + 1, 2_000_001)
    without, present = normal.pdf(x, 0, z), normal.pdf(x, 1, z)
    mixed = (1 - q) * without + q * present
    worst = (np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((mixed, without), (without, mixed)))
    return max(worst) * (x[1] - x[0])


@pytest.mark.parametrize(("q", "z"), [(0.2, 1.0), (0.5, 2.0)])
def test_one_sampled_round_is_the_integral(q: float, z: float) -> None:
    assert one_round_delta(q, z, epsilon([Release(q, z)], 1e-5)) == pytest.approx(1e-5, rel=0.05)


def renyi_epsilon(q: float, z: float, rounds: int, delta: float) -> float:
    """Return an upper bound of epsilon by Renyi divergence at whole orders (Mironov et al., arXiv 1908.10530, 3.3)."""
    bounds = []
    for order in range(2, 40):
        terms = [comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp(k * (k - 1) / (2 * z**2))
                 for k in range(order + 1)]  # fmt: skip
        bounds.append(rounds * math.log(sum(terms)) / (order - 1) + math.log(1 / delta) / (order - 1))
    return min(bounds)


def test_sampled_rounds_are_below_the_renyi_bound_and_not_far_below() -> None:
    bound = renyi_epsilon(0.2, 1.5, 30, 1e-5)
    assert 0.6 * bound < epsilon([Release(0.2, 1.5)] * 30, 1e-5) < bound


def test_rounds_of_different_kinds_compose_in_any_order() -> None:
    """30 rounds with z = 4 and 10 with z = 2, without sampling, equal one Gaussian with 1 / z^2 = 30 / 16 + 10 / 4."""
    mixed = [Release(1.0, 4.0)] * 30 + [Release(1.0, 2.0)] * 10
    expected = gaussian_epsilon((30 / 16 + 10 / 4) ** -0.5, 1, 1e-5)
    assert epsilon(mixed, 1e-5) == pytest.approx(expected, rel=2e-3)
    assert epsilon(mixed[::-1], 1e-5) == pytest.approx(epsilon(mixed, 1e-5), rel=1e-9)


def test_clipping_by_hand() -> None:
    """(3, 4, 12) has the norm 13: clipped to 6.5 it is halved, clipped to 20 it is unchanged."""
    change = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([[12.0]])}
    half = clip(change, 6.5)
    assert half["x"].tolist() == [1.5, 2.0] and half["y"].tolist() == [[6.0]]
    assert clip(change, 20.0)["x"].tolist() == [3.0, 4.0]
    assert clip({"x": torch.zeros(2)}, 1.0)["x"].tolist() == [0.0, 0.0]


def test_without_clipping_and_noise_the_average_is_the_plain_one() -> None:
    round_ = random_round(4, weighting="equal")
    plain, private = fedavg(round_).adapter, private_average(round_, ALL, 64.0, 1e-12, 4)
    assert private.notes == {"clipped": 0}
    for name, tensor in plain.items():
        assert torch.allclose(private.adapter[name], tensor, atol=1e-5), "up to two steps of 64 / 2^24"


def test_one_client_moves_the_average_by_clip_over_n_at_most() -> None:
    """For any update, without noise; n = 5 is the wanted number of clients, although fewer reply."""
    before, honest = random_adapter(0), [update(i, random_adapter(i), 10 * i) for i in (1, 2)]
    huge = update(3, {name: 1e6 * tensor for name, tensor in random_adapter(3).items()}, 10**9)
    without_client, with_client = (
        private_average(make_round(before, updates, weighting="equal"), ALL, 0.5, 0.0, 5).adapter
        for updates in (honest, [*honest, huge])
    )
    moved = norm({name: with_client[name].double() - without_client[name].double() for name in before})
    assert moved == pytest.approx(0.5 / 5, rel=1e-4)


def test_the_noise_has_the_stated_deviation() -> None:
    """Without updates: z C / n = 1.5 * 0.8 / 4. With 40 000 values the standard error of the deviation is 0.4 %."""
    before = {"l.lora_A.weight": torch.zeros(200, 100), "l.lora_B.weight": torch.zeros(200, 100)}
    adapter = private_average(make_round(before, []), ALL, 0.8, 1.5, 4).adapter
    values = torch.cat([tensor.flatten() for tensor in adapter.values()])
    assert float(values.std()) == pytest.approx(0.3, rel=0.02) and abs(float(values.mean())) < 0.3 * 5 / 200
    assert not torch.equal(adapter["l.lora_A.weight"], adapter["l.lora_B.weight"])


def test_random_numbers_have_their_distributions() -> None:
    """Kolmogorov and Smirnov, at odds of 1e-6 for a false alarm; the ends of the range, from chosen bytes."""
    assert kstest(uniforms(100_000), "uniform").pvalue > 1e-6
    assert kstest(normals(100_000), "norm").pvalue > 1e-6
    assert uniforms(2, lambda count: bytes(8) + b"\xff" * 8).tolist() == [2.0**-53, 1.0]
    assert abs(normals(1, bytes)[0]) == pytest.approx(math.sqrt(2 * 53 * math.log(2)))


def test_no_seed_gives_the_noise_and_the_sample_again(private: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seeds of all generators, and of the run, give others; no other generator is opened for them."""

    def draw() -> tuple[torch.Tensor, list[int]]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        noise = private_average(make_round({"head.bias": torch.zeros(64)}, []), ALL, 1.0, 1.0, 1).adapter["head.bias"]
        return noise, sample(Config.from_flat(private | {"num-clients": 100, "clients-per-round": 50}), range(100), 1)

    monkeypatch.setattr(np.random, "default_rng", None)
    monkeypatch.setattr(torch, "Generator", None)
    (noise, sampled), (other_noise, other_sampled) = draw(), draw()
    assert not torch.equal(noise, other_noise) and sampled != other_sampled


def test_published_values_are_whole_steps_of_the_grid() -> None:
    """So the last digits say nothing: with C = 1 and n = 1 the change of each value is a multiple of 2^-24."""
    round_ = make_round({"head.bias": torch.zeros(1000)}, [update(1, {"head.bias": torch.randn(1000)}, 1)])
    published = private_average(round_, ALL, 1.0, 0.1, 1).adapter["head.bias"].double() * STEPS
    assert torch.equal(published, published.round())


def test_parts_that_do_not_travel_get_no_noise() -> None:
    round_ = random_round(weighting="equal")
    adapter = private_average(round_, {"B", "head"}, 1.0, 1.0, 3).adapter
    for name, old in round_.before.items():
        assert torch.equal(adapter[name], old) == (".lora_A." in name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "dp-clip = 1 needs weighting = 'equal'"),
        ({"weighting": "activity"}, "dp-clip = 1 needs weighting = 'equal'"),
        ({"weighting": "equal", "control-variates": True}, "control-variates"),
        ({"weighting": "equal", "over-sample": 0.5, "failures": "tolerant"}, "over-sample = 0.5"),
    ],
)
def test_settings_that_break_the_sensitivity_are_rejected(changes: Settings, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(Config.from_flat({"dp-clip": 1.0, **changes}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_only_linear_rules_are_private(rule: Rule) -> None:
    config = Config.from_flat({"dp-clip": 1.0, "weighting": "equal", "rule": rule.name, "local-training": "lora"})
    if rule.linear and not rule.grams:
        check(config)
    else:
        with pytest.raises(ConfigError, match=f"rule = '{rule.name}' does not combine with dp-clip"):
            check(config)


def test_fedsvd_refactors_the_private_average(private: Settings, tmp_path: Path) -> None:
    """All values of B have noise, so each A has orthonormal rows; plain ffa-lora would keep the common start's."""
    adapter = final_adapter(run_federation(private | {"rule": "fedsvd", "num-rounds": 1}, tmp_path / "run"))
    for name in parts(adapter, {"A"}):
        assert torch.allclose(adapter[name] @ adapter[name].T, torch.eye(2), atol=1e-5)


@pytest.fixture
def private(tiny: Settings) -> Settings:
    flat = {"dp-clip": 0.02, "dp-noise-multiplier": 0.8, "weighting": "equal", "num-rounds": 3, "path-pairs": 0}
    return tiny | flat | {"merge-gap-clients": 0}


def test_every_journal_line_has_the_privacy_spent_so_far(private: Settings, tmp_path: Path) -> None:
    directory = run_federation(private, tmp_path / "run")
    rows = journal(directory)
    spent = [row["privacy"]["epsilon"] for row in rows]
    assert spent == pytest.approx([gaussian_epsilon(0.8, rounds, 1e-5) for rounds in (1, 2, 3)], rel=2e-3)
    assert [row["notes"]["clipped"] for row in rows] == [6, 6, 6]
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["privacy"] == rows[-1]["privacy"]


def test_the_noise_does_not_follow_from_the_seed(private: Settings, tmp_path: Path) -> None:
    """Two runs of one configuration differ by as much as their noise: sqrt(2 P) z C / 6 after one round."""
    a, b = (final_adapter(run_federation(private | {"num-rounds": 1}, tmp_path / name)) for name in "ab")
    apart = norm({name: a[name].double() - b[name].double() for name in a})
    size = sum(tensor.numel() for tensor in a.values())
    assert apart == pytest.approx(math.sqrt(2 * size) * 0.8 * 0.02 / 6, rel=0.1)


def test_a_private_run_that_stopped_in_training_resumes_at_no_extra_cost(private: Settings, tmp_path: Path) -> None:
    flat = private | {"clients-per-round": 3}
    with pytest.raises(Stop):
        run_federation(flat, tmp_path / "run", grid=StoppingGrid(2, 3))
    assert len(journal(tmp_path / "run")) in (1, 2, 3)
    rows = journal(run_federation(flat, tmp_path / "run"))
    assert rows[-1]["privacy"]["epsilon"] == pytest.approx(epsilon([Release(0.5, 0.8)] * 3, 1e-5))
    assert {row["privacy"]["sampling_rate"] for row in rows} == {0.5}


class Offline(LocalGrid):
    """Three nodes, of which the last does not train."""

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 102:
            return Message(Error(code=0, reason="offline"), reply_to=message)
        return super().answer(message)


def test_a_round_that_is_done_again_does_not_take_its_noise_off(
    private: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack of the audit: a round is published, interrupted, and done again without some clients.

    With the same noise the difference of both publications was the missing clients' update (cosine 1.0000). Here each
    has its own noise, and each is charged.
    """
    flat = private | {"num-rounds": 1, "failures": "tolerant", "dp-noise-multiplier": 5.0}
    published, missing = [], []
    evaluate_round = federation.evaluate_round

    def publish(grid: Grid, strategy: CohortStrategy, *others: Any) -> RoundEvaluation:
        published.append(strategy.state.adapter)
        if len(published) == 2:
            return evaluate_round(grid, strategy, *others)
        _, before, training, _ = others
        by_client = {update.client: update for update in training.result.updates}
        for client in training.request.cohorts[102]:
            missing.append(difference(before.adapter | by_client[client].adapter, before.adapter))
        raise Stop

    monkeypatch.setattr(federation, "evaluate_round", publish)
    with pytest.raises(Stop):
        run_federation(flat, tmp_path / "run", grid=LocalGrid(3))
    (row,) = journal(run_federation(flat, tmp_path / "run", grid=Offline(3)))
    assert len(row["missing"]) == len(missing) == 2
    total = {name: sum(change[name] for change in missing) for name in published[0]}
    apart, secret = (
        torch.cat([adapter[name].flatten().double() for name in sorted(adapter)])
        for adapter in (difference(*published), total)
    )
    assert abs(float(torch.cosine_similarity(apart, secret, dim=0))) < 0.2
    assert row["privacy"]["epsilon"] == pytest.approx(epsilon([Release(1.0, 5.0)] * 2, 1e-5))


def test_a_run_that_would_exceed_its_budget_does_not_start(private: Settings, tmp_path: Path) -> None:
    """The budget is a little more than two of the three rounds spend."""
    budget = gaussian_epsilon(0.8, 2, 1e-5) + 0.1

    class CountingGrid(LocalGrid):
        num_train_messages = 0

        def answer(self, message: Message) -> Message:
            self.num_train_messages += message.metadata.message_type == "train"
            return super().answer(message)

    grid = CountingGrid(2)
    with pytest.raises(ConfigError, match=r"3 more rounds would bring epsilon to 1\d\.\d+ .*2 more rounds fit"):
        run_federation(private | {"dp-budget": budget}, tmp_path / "run", grid=grid)
    assert grid.num_train_messages == 0
    run_federation(private | {"dp-budget": budget, "num-rounds": 2}, tmp_path / "two")


def test_a_run_whose_interrupted_round_has_spent_the_last_one_ends_before_it(private: Settings, tmp_path: Path) -> None:
    """The first round is charged twice, so that one of the three rounds does not fit."""
    flat = private | {"dp-budget": gaussian_epsilon(0.8, 3, 1e-5) + 0.1}
    run_federation(flat | {"num-rounds": 1}, tmp_path / "run")
    ledger = tmp_path / "run/privacy.jsonl"
    ledger.write_text(ledger.read_text() * 2)
    (tmp_path / "run/summary.json").unlink()
    run_federation(flat, tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["rounds"], len(read_ledger(ledger))) == (2, 3)
    assert re.fullmatch(r"no round more fits into dp-budget = \d+\.\d+", summary["ended_early"])


def test_privacy_spent_before_a_resume_counts(tmp_path: Path) -> None:
    settings = PrivacyConfig(dp_clip=0.1, dp_noise_multiplier=0.8, dp_budget=gaussian_epsilon(0.8, 2, 1e-5) + 0.1)
    budget = PrivacyBudget(tmp_path, settings, 0)
    budget.check(1.0, 2)
    spent = [budget.charge(1.0, [0]).epsilon for _ in range(2)]
    assert spent == pytest.approx([gaussian_epsilon(0.8, rounds, 1e-5) for rounds in (1, 2)], rel=2e-3)
    with pytest.raises(ConfigError, match="1 more rounds would bring epsilon .* 0 more rounds fit"):
        PrivacyBudget(tmp_path, settings, 2).check(1.0, 1)


def test_a_release_at_a_higher_sampling_rate_than_at_the_start_stays_within_the_budget(tmp_path: Path) -> None:
    """A node has joined, and the second release is at 1.0."""
    settings = PrivacyConfig(dp_clip=0.1, dp_noise_multiplier=0.8, dp_budget=gaussian_epsilon(0.8, 1, 1e-5) + 0.1)
    budget = PrivacyBudget(tmp_path, settings, 0)
    budget.check(0.5, 1)
    spent = budget.charge(0.5, [0])
    with pytest.raises(ConfigError, match="1 more rounds would bring epsilon"):
        budget.charge(1.0, [0, 1])
    assert [charge.epsilon for charge in read_ledger(tmp_path / "privacy.jsonl")] == [spent.epsilon]


def test_half_a_line_was_not_published_and_a_lost_one_stops_the_run(tmp_path: Path) -> None:
    settings, ledger = PrivacyConfig(dp_clip=0.1, dp_noise_multiplier=0.8), tmp_path / "privacy.jsonl"
    ledger.write_text('{"epsi')
    PrivacyBudget(tmp_path, settings, 0).charge(1.0, [0])
    with ledger.open("a") as file:
        file.write('{"epsilon": 3')
    assert len(read_ledger(ledger)) == 1
    PrivacyBudget(tmp_path, settings, 1).charge(1.0, [0])
    assert len(read_ledger(ledger)) == 2, "the next line is whole"
    with pytest.raises(DamagedFile, match="privacy.jsonl is damaged: it has 2 releases, and the run has 3 rounds"):
        PrivacyBudget(tmp_path, settings, 3)
    ledger.write_text("{\n" + ledger.read_text())
    with pytest.raises(DamagedFile, match="privacy.jsonl is damaged: not valid JSON"):
        PrivacyBudget(tmp_path, settings, 1)


@pytest.mark.slow
def test_a_round_without_clients_adds_noise_and_spends_privacy(private: Settings, tmp_path: Path) -> None:
    """One of six clients is wanted, so a third of the Poisson samples is empty; odds of 6e-5 that none of 24 is."""
    rows = journal(
        run_federation(
            private | {"clients-per-round": 1, "num-rounds": 24, "local-steps": 1, "eval-every": 24}, tmp_path / "run"
        )
    )
    assert len(rows) == 24 and min(len(row["clients"]) for row in rows) == 0
    spent = [row["privacy"]["epsilon"] for row in rows]
    assert spent == sorted(spent) and len(set(spent)) == 24
