"""Client-level differential privacy: the accountant against closed forms, clip and noise by hand, whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import comb
from scipy.stats import norm as normal

from copra_fl.adapters.state import norm
from copra_fl.aggregation import RULES, check
from copra_fl.aggregation.accounting import Release, epsilon
from copra_fl.aggregation.private import clip, private_average
from copra_fl.aggregation.rule import ALL
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.config import Config, ConfigError, PrivacyConfig
from copra_fl.records import PrivacySpent
from server.privacy_budget import PrivacyBudget, open_secret
from tests.support.federations import Stop, StoppingGrid, final_adapter
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.rounds import make_round, random_adapter, random_round, update
from tests.support.tiny import Settings


def gaussian_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Of composed Gaussian mechanisms without sampling, exactly (Balle and Wang, arXiv 1805.06530, theorem 8).

    delta(e) = P(1 / (2 s) - e s) - exp(e) P(-1 / (2 s) - e s), with s = z / sqrt(T) and P the normal distribution.
    """
    s = noise_multiplier / math.sqrt(rounds)
    return brentq(lambda e: normal.cdf(0.5 / s - e * s) - math.exp(e) * normal.cdf(-0.5 / s - e * s) - delta, 0, 500)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(1.0, 1, 1e-5), (0.8, 3, 1e-5), (4.0, 50, 1e-6)])
def test_without_sampling_epsilon_is_the_closed_form(z: float, rounds: int, delta: float) -> None:
    assert epsilon([Release(1.0, z)] * rounds, delta) == pytest.approx(gaussian_epsilon(z, rounds, delta), rel=2e-3)


def one_round_delta(q: float, z: float, epsilon: float) -> float:
    """Of one round over a Poisson sample, by numerical integration over the sum's outcome.

    With the client the outcome is (1 - q) N(0, z^2) + q N(1, z^2), without it N(0, z^2); the worse of both directions.
    """
    x = np.linspace(-40 * z, 40 * z + 1, 2_000_001)
    without, there = normal.pdf(x, 0, z), normal.pdf(x, 1, z)
    mixed = (1 - q) * without + q * there
    worst = (np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((mixed, without), (without, mixed)))
    return max(worst) * (x[1] - x[0])


@pytest.mark.parametrize(("q", "z"), [(0.2, 1.0), (0.5, 2.0)])
def test_one_sampled_round_is_the_integral(q: float, z: float) -> None:
    assert one_round_delta(q, z, epsilon([Release(q, z)], 1e-5)) == pytest.approx(1e-5, rel=0.05)


def renyi_epsilon(q: float, z: float, rounds: int, delta: float) -> float:
    """An upper bound by Renyi divergence at whole orders (Mironov et al., arXiv 1908.10530, section 3.3)."""
    bounds = []
    for order in range(2, 40):
        terms = [comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp(k * (k - 1) / (2 * z**2))
                 for k in range(order + 1)]  # fmt: skip
        bounds.append(rounds * math.log(sum(terms)) / (order - 1) + math.log(1 / delta) / (order - 1))
    return min(bounds)


def test_sampled_rounds_are_below_the_renyi_bound_and_not_far_below() -> None:
    got, bound = epsilon([Release(0.2, 1.5)] * 30, 1e-5), renyi_epsilon(0.2, 1.5, 30, 1e-5)
    assert 0.6 * bound < got < bound


def test_rounds_of_different_kinds_compose_in_any_order() -> None:
    """30 rounds at z = 4 without sampling and 10 at z = 2 are one Gaussian of 1 / z^2 = 30 / 16 + 10 / 4."""
    mixed = [Release(1.0, 4.0)] * 30 + [Release(1.0, 2.0)] * 10
    expected = gaussian_epsilon((30 / 16 + 10 / 4) ** -0.5, 1, 1e-5)
    assert epsilon(mixed, 1e-5) == pytest.approx(expected, rel=2e-3)
    assert epsilon(mixed[::-1], 1e-5) == pytest.approx(epsilon(mixed, 1e-5), rel=1e-9)


def test_clipping_by_hand() -> None:
    """3, 4 and 12 have the norm 13; to 6.5 it is halved, to 20 it stays."""
    change = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([[12.0]])}
    half = clip(change, 6.5)
    assert half["x"].tolist() == [1.5, 2.0] and half["y"].tolist() == [[6.0]]
    assert clip(change, 20.0)["x"].tolist() == [3.0, 4.0]
    assert clip({"x": torch.zeros(2)}, 1.0)["x"].tolist() == [0.0, 0.0]


def test_without_clip_and_noise_it_is_the_plain_average() -> None:
    round_ = random_round(4, weighting="equal")
    plain, private = fedavg(round_).adapter, private_average(round_, ALL, 1e6, 1e-12, 4, noise=0)
    assert private.notes == {"clipped": 0}
    for name, tensor in plain.items():
        assert torch.allclose(private.adapter[name], tensor, atol=1e-6)


def test_one_client_moves_the_average_by_clip_over_n_at_most() -> None:
    """Whatever it sends, with the same noise; n is what a round wants, also where fewer came."""
    before, honest = random_adapter(0), [update(i, random_adapter(i), 10 * i) for i in (1, 2)]
    huge = update(3, {name: 1e6 * tensor for name, tensor in random_adapter(3).items()}, 10**9)
    without, with_it = (
        private_average(make_round(before, updates, weighting="equal"), ALL, 0.5, 1.0, 5, noise=7).adapter
        for updates in (honest, [*honest, huge])
    )
    moved = norm({name: with_it[name].double() - without[name].double() for name in before})
    assert moved == pytest.approx(0.5 / 5, rel=1e-4)


def test_the_noise_has_the_stated_deviation_and_another_stream_each_round() -> None:
    """On nobody's changes: z C / n = 1.5 * 0.8 / 4. 40 000 values, so the deviation is known to 0.4 %."""
    before = {"l.lora_A.weight": torch.zeros(200, 100), "l.lora_B.weight": torch.zeros(200, 100)}
    first, again, other = (
        private_average(make_round(before, []), ALL, 0.8, 1.5, 4, noise=seed).adapter for seed in (1, 1, 2)
    )
    values = torch.cat([tensor.flatten() for tensor in first.values()])
    assert float(values.std()) == pytest.approx(0.3, rel=0.02) and abs(float(values.mean())) < 0.3 * 5 / 200
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["l.lora_A.weight"], first["l.lora_B.weight"])


def test_what_does_not_travel_gets_no_noise() -> None:
    round_ = random_round(weighting="equal")
    adapter = private_average(round_, {"B", "head"}, 1.0, 1.0, 3, noise=0).adapter
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
def test_what_breaks_the_sensitivity_is_refused(changes: Settings, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Config.from_flat({"dp-clip": 1.0, **changes})


@pytest.mark.parametrize("rule", RULES)
def test_only_linear_rules_are_private(rule: str) -> None:
    config = Config.from_flat({"dp-clip": 1.0, "weighting": "equal", "rule": rule, "local-training": "lora"})
    if RULES[rule].linear:
        check(config)
    else:
        with pytest.raises(ConfigError, match=f"rule = '{rule}' does not combine with dp-clip"):
            check(config)


@pytest.fixture
def private(tiny: Settings) -> Settings:
    flat = {"dp-clip": 0.02, "dp-noise-multiplier": 0.8, "weighting": "equal", "num-rounds": 3, "path-pairs": 0}
    return tiny | flat | {"merge-gap-clients": 0}


def journal(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]


def test_every_journal_line_says_what_has_been_spent(private: Settings, tmp_path: Path) -> None:
    directory = run_federation(private, tmp_path / "run")
    rows = journal(directory)
    spent = [row["privacy"]["epsilon"] for row in rows]
    assert spent == pytest.approx([gaussian_epsilon(0.8, rounds, 1e-5) for rounds in (1, 2, 3)], rel=2e-3)
    assert [row["notes"]["clipped"] for row in rows] == [6, 6, 6]
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["privacy"] == rows[-1]["privacy"]
    assert not (directory / "dp-secret").exists()


def test_noise_cannot_be_drawn_again_from_the_seed(private: Settings, tmp_path: Path) -> None:
    """Two runs of one configuration differ, by about as much as their noise: sqrt(2 P) z C / 6 in a round."""
    a, b = (final_adapter(run_federation(private | {"num-rounds": 1}, tmp_path / name)) for name in "ab")
    apart = norm({name: a[name].double() - b[name].double() for name in a})
    size = sum(tensor.numel() for tensor in a.values())
    assert apart == pytest.approx(math.sqrt(2 * size) * 0.8 * 0.02 / 6, rel=0.1)


def test_a_private_run_resumes_with_the_same_noise_sample_and_epsilon(private: Settings, tmp_path: Path) -> None:
    """Bitwise as the whole run that had the same secret."""
    flat = private | {"clients-per-round": 3}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dp-secret").write_text("5eed")
    whole = run_federation(flat, tmp_path / "whole")
    with pytest.raises(Stop):
        run_federation(flat, tmp_path / "stopped", grid=StoppingGrid(2, 3))
    assert (tmp_path / "stopped" / "dp-secret").exists() and len(journal(tmp_path / "stopped")) in (1, 2)
    resumed = run_federation(flat, tmp_path / "stopped")
    got, wanted = final_adapter(resumed), final_adapter(whole)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [row["privacy"] for row in journal(resumed)] == [row["privacy"] for row in journal(whole)]
    assert {row["privacy"]["sampling_rate"] for row in journal(whole)} == {0.5}


def test_a_run_that_would_pass_its_budget_does_not_start(private: Settings, tmp_path: Path) -> None:
    """Two of three rounds fit below what two cost and a bit."""
    budget = gaussian_epsilon(0.8, 2, 1e-5) + 0.1

    class Watched(LocalGrid):
        trained = 0

        def answer(self, message):
            self.trained += message.metadata.message_type == "train"
            return super().answer(message)

    grid = Watched(2)
    with pytest.raises(ConfigError, match=r"3 more rounds would bring epsilon to 1\d\.\d+ .*2 more rounds fit"):
        run_federation(private | {"dp-budget": budget}, tmp_path / "run", grid=grid)
    assert grid.trained == 0
    run_federation(private | {"dp-budget": budget, "num-rounds": 2}, tmp_path / "two")


def test_what_was_spent_before_a_resume_counts() -> None:
    spent = [PrivacySpent(epsilon=1.0, delta=1e-5, sampling_rate=1.0, noise_multiplier=0.8, clip=0.1)] * 2
    settings = PrivacyConfig(0.1, 0.8, 1e-5, dp_budget=gaussian_epsilon(0.8, 2, 1e-5) + 0.1)
    PrivacyBudget(settings, []).check(1.0, 2)
    PrivacyBudget(settings, spent).check(1.0, 0)
    with pytest.raises(ConfigError, match="1 more rounds would bring epsilon .* 0 more rounds fit"):
        PrivacyBudget(settings, spent).check(1.0, 1)


def test_a_round_without_any_client_is_noise_alone(private: Settings, tmp_path: Path) -> None:
    """One client wanted of six: a third of the samples is empty. The run goes on, and spends for such rounds too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dp-secret").write_text("5eed")
    directory = run_federation(private | {"clients-per-round": 1, "num-rounds": 6}, tmp_path / "run")
    rows = journal(directory)
    assert len(rows) == 6 and min(len(row["clients"]) for row in rows) == 0
    spent = [row["privacy"]["epsilon"] for row in rows]
    assert spent == sorted(spent) and len(set(spent)) == 6


def test_the_secret_is_its_owners_only_and_stays(tmp_path: Path) -> None:
    secret = open_secret(tmp_path)
    assert secret.bit_length() > 200 and open_secret(tmp_path) == secret
    assert (tmp_path / "dp-secret").stat().st_mode & 0o777 == 0o600
