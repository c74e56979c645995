"""`copra-fl probe shapley` and `copra-fl probe prune` on real finished_run runs of the tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from copra_fl.cli import app
from copra_fl.probes import pruned_adapters
from copra_fl.probes.exported import Game, Whole, solve
from copra_fl.probes.open_run import OpenRun, Progress, open_run
from tests.support.browser import check_page, needs_chromium
from tests.support.command_line import run_command
from tests.support.federations import finished_run
from tests.support.tiny import Settings

TRAINED: Settings = {"learning-rate": 0.02, "local-steps": 12, "target-modules": "all-linear"}


@pytest.fixture(scope="module")
def runs(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRA and CopRA of one seed."""
    folder = tmp_path_factory.mktemp("runs")
    return [finished_run(tiny | TRAINED | {"local-training": name}, folder / name) for name in ("lora", "copra")]


def probe(name: str, runs: list[Path], output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the command says in its JSON file, and on the terminal."""
    result = CliRunner().invoke(
        app, ["probe", name, *map(str, runs), "--output", str(output), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return json.loads((output / f"probe-{name}.json").read_text()), result.output


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def watched() -> tuple[Progress, list[tuple[str, float, float]]]:
    seen: list[tuple[str, float, float]] = []
    return lambda *told: seen.append(told), seen


@pytest.fixture(scope="module")
def lora(runs: list[Path]) -> OpenRun:
    return open_run(runs[0])


@pytest.fixture(scope="module")
def valued(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    output = tmp_path_factory.mktemp("shapley")
    return *probe("shapley", runs, output), output


@pytest.fixture(scope="module")
def valued_modules(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    output = tmp_path_factory.mktemp("shapley-modules")
    return *probe("shapley", runs[:1], output, "--modules", "--standard-error", "0.05"), output


def test_shapley_of_layers(valued: tuple[dict[str, Any], str, Path], runs: list[Path], lora: OpenRun) -> None:
    facts, printed, _ = valued
    assert facts["split"] == "server-validation" and [run["seed"] for run in facts["runs"]] == [0, 0]
    assert facts["seed"] == 0 and "all 8 coalitions" in facts["setting"]
    for run, worth in zip(runs, facts["layers"], strict=True):
        assert worth["players"] == [f"encoder.layer.{layer}" for layer in range(3)] and worth["exact"]
        assert worth["accuracy"]["everything"] == pytest.approx(summary(run)["validation"]["accuracy"])
        assert worth["minus_loss"]["everything"] == pytest.approx(-summary(run)["validation"]["loss"], rel=1e-4)
        for metric in ("accuracy", "minus_loss"):
            total = worth[metric]["everything"] - worth[metric]["nothing"]
            assert (
                sum(worth[metric]["values"]) == pytest.approx(total) and abs(worth[metric]["efficiency_error"]) < 1e-9
            )
        assert f"{run.name} " in printed
    assert facts["layers"][0]["accuracy"]["everything"] > facts["layers"][0]["accuracy"]["nothing"], "it has learnt"


def test_shapley_of_modules_is_sampled(valued_modules: tuple[dict[str, Any], str, Path]) -> None:
    facts, printed, _ = valued_modules
    (worth,) = facts["modules"]
    assert len(worth["players"]) == 18 and not worth["exact"]
    assert 0 < max(worth["accuracy"]["errors"]) <= 0.05
    assert worth["accuracy"]["orders"] == worth["minus_loss"]["orders"] >= 32
    assert sum(worth["accuracy"]["values"]) == pytest.approx(
        worth["accuracy"]["everything"] - worth["accuracy"]["nothing"]
    )
    assert f"modules: {worth['accuracy']['orders']} orders, seed 0" in facts["setting"]


@needs_chromium
def test_the_page_of_shapley_opens(valued_modules: tuple[dict[str, Any], str, Path]) -> None:
    """Bars of two metrics for layers and for modules, and two maps."""
    check_page(valued_modules[2] / "probe-shapley.html", 2 + 2 + 2)


def test_no_coalition_is_evaluated_twice(lora: OpenRun) -> None:
    progress, seen = watched()
    game = Game(Whole(lora), list(pruned_adapters.layers(lora.adapter).values()), "test", progress)
    solved = solve(game, 0.005, 4, seed=0)
    assert sum(done for _, done, _ in seen) == 8 and seen[-1] == ("lora: coalitions of 3", 8, 8)
    np.testing.assert_allclose(solved["accuracy"].everything, lora.score([lora.adapter], "test")[0]["accuracy"])


@pytest.fixture(scope="module")
def pruned(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    output = tmp_path_factory.mktemp("prune")
    return *probe("prune", runs, output, "--split", "test"), output


def test_prunings(pruned: tuple[dict[str, Any], str, Path], runs: list[Path], lora: OpenRun) -> None:
    facts, printed, _ = pruned
    assert facts["split"] == "test" and "examples (test)" in facts["setting"]
    for run, found in zip(runs, facts["prunings"], strict=True):
        points = {point["name"]: point for point in found["points"]}
        assert len(points) == len(found["points"]) == 2 + 5 + 6 + 2 + 9
        assert points["everything"]["accuracy"] == pytest.approx(summary(run)["test"]["accuracy"])
        assert points["everything"]["kept"] == 1 and points["head alone"]["kept"] == 0
        assert points["head alone"]["loss"] != pytest.approx(points["everything"]["loss"])
    (query,) = (
        each for each in pruned_adapters.single_modules(lora.adapter) if each.name == "attention.self.query alone"
    )
    first = {point["name"]: point for point in facts["prunings"][0]["points"]}
    assert first[query.name]["loss"] == pytest.approx(lora.score([query.adapter], "test")[0]["loss"], rel=1e-4)
    assert "every other layer" in printed and "largest 50%" in printed


@needs_chromium
def test_the_page_of_prunings_opens(pruned: tuple[dict[str, Any], str, Path]) -> None:
    check_page(pruned[2] / "probe-pruned_adapters.html", 6)


def test_what_aggregation_added_to_the_base_is_pruned_too(tiny: Settings, tmp_path: Path) -> None:
    """FLoRA's own adapter is zero after each round: all it has learnt is in the residual."""
    run = finished_run(tiny | TRAINED | {"rule": "flora", "target-modules": "query,value"}, tmp_path / "flora")
    facts, printed = probe("prune", [run], tmp_path)
    points = {point["name"]: point for point in facts["prunings"][0]["points"]}
    validation = summary(run)["validation"]
    assert points["everything"]["loss"] == pytest.approx(validation["loss"], rel=1e-3)
    assert points["head alone"]["loss"] != pytest.approx(validation["loss"], rel=1e-3)
    assert "'flora' has changed W0" in printed


def test_what_cannot_be_probed_is_said(tmp_path: Path) -> None:
    assert "no folder of a run" in run_command("probe", "shapley", tmp_path, code=2).message


def test_runs_of_one_name_are_refused(runs: list[Path], tmp_path: Path) -> None:
    output = run_command("probe", "prune", runs[0], runs[0], "--output", tmp_path, code=2)
    assert "several runs are called lora" in output.message
