"""Merging two federations: the command against `copra-fl probe merge`, and the interval over pairs against theory."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from copra_fl.cli import app
from experiments import two_federations
from experiments.two_federations_summary import MERGES, over_pairs
from tests.support.federations import finished_comparison
from tests.support.tiny import Settings


def test_the_command_scores_each_pair_as_the_probe_does(
    tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, folder = tiny | {"rule": "fedavg", "num-clients": 3}, tmp_path / "tweets" / "12x10" / "test"
    comparison = finished_comparison(flat, ["lora", "copra"], range(3), folder)
    arguments = [str(comparison), "--methods", "lora,copra", "--seeds", "0,1,2", "--date", "20260101"]
    two_federations.main([*arguments, "--results", str(tmp_path)])
    facts = json.loads((tmp_path / "two-federations-tweets-20260101.json").read_text())
    copra = facts["measured"]["copra"]
    assert [pair["members"] for pair in copra["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    folders = [str(comparison / f"copra-seed{seed}") for seed in (0, 2)]
    CliRunner().invoke(app, ["probe", "merge", *folders, "--split", "test"], catch_exceptions=False)
    probe = json.loads((comparison / "copra-seed0" / "probe-merge.json").read_text())
    for alone, row in zip((copra["alone"][0], copra["alone"][2]), probe["before"], strict=True):
        assert alone["loss"] == pytest.approx(row["loss"], rel=1e-5)
    for row in probe["merged"]:
        if row["name"] in MERGES:
            assert copra["pairs"][1][row["name"]]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert capsys.readouterr().out.count("\n| tweets | ") == 2


def test_the_interval_over_pairs_of_sums_is_that_over_runs() -> None:
    """The value of a pair is the sum of one number per run: the jackknife gives back the t-interval of the numbers."""
    numbers = np.array([0.3, -0.1, 0.4, 0.8, 0.2])
    estimated = over_pairs({(i, j): numbers[i] + numbers[j] for i, j in combinations(range(5), 2)})
    low, high = stats.t.interval(0.95, 4, 2 * numbers.mean(), 2 * stats.sem(numbers))
    assert estimated.mean == pytest.approx(2 * numbers.mean())
    assert estimated.interval == pytest.approx((low, high))


def test_the_interval_over_pairs_covers_the_mean() -> None:
    """Products of exponential numbers, whose expectation is 1, over 12 runs: pairs share runs, yet about 95 % cover."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        numbers = 1 + 0.3 * (rng.exponential(size=12) - 1)
        estimated = over_pairs({(i, j): numbers[i] * numbers[j] for i, j in combinations(range(12), 2)})
        assert estimated.interval
        covered.append(estimated.interval[0] <= 1 <= estimated.interval[1])
    assert 0.88 < np.mean(covered) < 0.98
