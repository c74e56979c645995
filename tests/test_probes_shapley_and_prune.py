"""`copra-fl probe shapley` and `copra-fl probe prune` on finished runs of the tiny data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from copra_fl.cli import app
from copra_fl.probes import pruned_adapters
from copra_fl.probes.exported import ExportedAdapter, Game, solve
from copra_fl.probes.open_run import OpenRun, Progress, open_run
from tests.support.browser import check_page, needs_chromium
from tests.support.command_line import run_command
from tests.support.federations import finished_run
from tests.support.tiny import Settings

#: facts in the JSON file, output on the terminal, folder of the page
ProbeOutput = tuple[dict[str, Any], str, Path]
TRAINED: Settings = {"learning-rate": 0.02, "local-steps": 12, "target-modules": "all-linear"}


@pytest.fixture(scope="module")
def runs(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRA and CopRA of one seed."""
    folder = tmp_path_factory.mktemp("runs")
    return [finished_run(tiny | TRAINED | {"local-training": name}, folder / name) for name in ("lora", "copra")]


def probe(name: str, runs: list[Path], output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run the command; return its JSON file and its output."""
    result = CliRunner().invoke(
        app, ["probe", name, *map(str, runs), "--output", str(output), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return json.loads((output / f"probe-{name}.json").read_text()), result.output


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def recording_progress() -> tuple[Progress, list[tuple[str, float, float]]]:
    """Return a progress callback and the list of its calls."""
    reports: list[tuple[str, float, float]] = []
    return lambda *report: reports.append(report), reports


@pytest.fixture(scope="module")
def lora_run(runs: list[Path]) -> OpenRun:
    return open_run(runs[0])


@pytest.fixture(scope="module")
def layer_values(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ProbeOutput:
    output = tmp_path_factory.mktemp("shapley")
    return *probe("shapley", runs, output), output


@pytest.fixture(scope="module")
def module_values(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ProbeOutput:
    output = tmp_path_factory.mktemp("shapley-modules")
    return *probe("shapley", runs[:1], output, "--modules", "--standard-error", "0.05"), output


def test_shapley_values_of_layers_are_exact_and_efficient(layer_values: ProbeOutput, runs: list[Path]) -> None:
    facts, printed, _ = layer_values
    assert facts["split"] == "server-validation" and [run["seed"] for run in facts["runs"]] == [0, 0]
    assert facts["seed"] == 0 and "all 8 coalitions" in facts["setting"]
    for run, values in zip(runs, facts["layers"], strict=True):
        assert values["players"] == [f"encoder.layer.{layer}" for layer in range(3)] and values["exact"]
        assert values["accuracy"]["grand"] == pytest.approx(summary(run)["validation"]["accuracy"])
        assert values["minus_loss"]["grand"] == pytest.approx(-summary(run)["validation"]["loss"], rel=1e-4)
        for metric in ("accuracy", "minus_loss"):
            total = values[metric]["grand"] - values[metric]["empty"]
            assert sum(values[metric]["values"]) == pytest.approx(total)
            assert abs(values[metric]["efficiency_error"]) < 1e-9
        assert f"{run.name} " in printed
    assert facts["layers"][0]["accuracy"]["grand"] > facts["layers"][0]["accuracy"]["empty"], "training has helped"


def test_shapley_values_of_modules_are_sampled(module_values: ProbeOutput) -> None:
    facts, _, _ = module_values
    (values,) = facts["modules"]
    accuracy, minus_loss = values["accuracy"], values["minus_loss"]
    assert len(values["players"]) == 18 and not values["exact"]
    assert 0 < max(accuracy["errors"]) <= 0.05
    assert accuracy["orders"] == minus_loss["orders"] >= 32
    assert sum(accuracy["values"]) == pytest.approx(accuracy["grand"] - accuracy["empty"])
    assert f"modules: {accuracy['orders']} orders, seed 0" in facts["setting"]


@needs_chromium
def test_shapley_page_opens_in_a_browser(module_values: ProbeOutput) -> None:
    """Bars of two metrics for layers and for modules, and two maps."""
    check_page(module_values[2] / "probe-shapley.html", 2 + 2 + 2)


def test_no_coalition_is_evaluated_twice(lora_run: OpenRun) -> None:
    progress, reports = recording_progress()
    game = Game(ExportedAdapter(lora_run), list(pruned_adapters.layers(lora_run.adapter).values()), "test", progress)
    solved = solve(game, 0.005, 4, seed=0)
    assert sum(done for _, done, _ in reports) == 8 and reports[-1] == ("lora: coalitions of 3", 8, 8)
    np.testing.assert_allclose(solved["accuracy"].grand, lora_run.score([lora_run.adapter], "test")[0]["accuracy"])


@pytest.fixture(scope="module")
def prunings(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ProbeOutput:
    output = tmp_path_factory.mktemp("prune")
    return *probe("prune", runs, output, "--split", "test"), output


def test_prunings_are_scored_on_the_test_split(prunings: ProbeOutput, runs: list[Path], lora_run: OpenRun) -> None:
    facts, printed, _ = prunings
    assert facts["split"] == "test" and "examples (test)" in facts["setting"]
    for run, run_facts in zip(runs, facts["prunings"], strict=True):
        points = {point["name"]: point for point in run_facts["points"]}
        assert len(points) == len(run_facts["points"]) == 2 + 5 + 6 + 2 + 9 + 2
        assert points["whole adapter"]["accuracy"] == pytest.approx(summary(run)["test"]["accuracy"])
        assert points["whole adapter"]["kept"] == 1 and points["head only"]["kept"] == 0
        assert points["head only"]["loss"] != pytest.approx(points["whole adapter"]["loss"])
    modules = {pruned.name: pruned for pruned in pruned_adapters.single_modules(lora_run.adapter)}
    query = modules["attention.self.query only"]
    lora_points = {point["name"]: point for point in facts["prunings"][0]["points"]}
    (metrics,) = lora_run.score([query.adapter], "test")
    assert lora_points[query.name]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert "every other layer" in printed and "largest 50 %" in printed
    assert not facts["warnings"], "other examples chose the order of the layers"


def test_elastic_scores_are_means_over_subsets_of_layers_and_prefixes_of_the_rank(
    prunings: ProbeOutput, lora_run: OpenRun
) -> None:
    """Of three layers 1, 3/4, 1/2 and 1/4 are 3, 2, 2 and 1; of rank 2 they are 2, 2, 1 and 1."""
    facts, printed, _ = prunings
    lora = facts["prunings"][0]
    assert [(row["layers"], row["possible"], len(row["accuracy"])) for row in lora["subsets"]] == [
        (3, 1, 1),
        (2, 3, 3),
        (1, 3, 3),
    ]
    modules_by_layer = list(pruned_adapters.layers(lora_run.adapter).values())
    without = [
        pruned_adapters.keep(lora_run.adapter, sum((other for other in modules_by_layer if other != modules), []))
        for modules in modules_by_layer
    ]
    losses = [metrics["loss"] for metrics in lora_run.score(without, "test")]
    assert sorted(lora["subsets"][1]["loss"]) == pytest.approx(sorted(losses), rel=1e-4)
    whole, two, one = (row["loss_mean"]["value"] for row in lora["subsets"])
    assert two == pytest.approx(sum(losses) / 3, rel=1e-4)
    score = lora["elastic"]["loss"]
    assert score["layers"] == {"value": pytest.approx((whole + 2 * two + one) / 4), "half_width": 0.0}
    points = {point["name"]: point["loss"] for point in lora["points"]}
    first = points["first 1 of 2 components, as stored"]
    assert score["rank as stored"] == pytest.approx((whole + first) / 2)
    assert score["rank in SVD order"] != score["rank as stored"]
    assert "2 of 3 layers, mean of 3 subsets" in printed and "Elastic score" in printed


@needs_chromium
def test_pruning_page_opens_in_a_browser(prunings: ProbeOutput) -> None:
    check_page(prunings[2] / "probe-prune.html", 2 + 8 + 2)


def test_the_residual_is_pruned_with_the_adapter(tiny: Settings, tmp_path: Path) -> None:
    """FLoRA's adapter is zero after each round: all it has learned is in the residual."""
    run = finished_run(tiny | TRAINED | {"rule": "flora", "target-modules": "query,value"}, tmp_path / "flora")
    facts, printed = probe("prune", [run], tmp_path)
    points = {point["name"]: point for point in facts["prunings"][0]["points"]}
    validation = summary(run)["validation"]
    assert points["whole adapter"]["loss"] == pytest.approx(validation["loss"], rel=1e-3)
    assert points["head only"]["loss"] != pytest.approx(validation["loss"], rel=1e-3)
    assert "'flora' has changed W0" in printed
    assert any("examples that chose the order" in warning for warning in facts["warnings"]), "on validation data"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert "is not the folder of a run" in run_command("probe", "shapley", tmp_path, code=2).message


def test_two_runs_of_one_name_are_refused(runs: list[Path], tmp_path: Path) -> None:
    output = run_command("probe", "prune", runs[0], runs[0], "--output", tmp_path, code=2)
    assert "several runs are called lora" in output.message
