"""Results of a study: estimates against scipy, rankings and regrets by hand, charts, and the report in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from copra_fl.records import CellResults, ChosenRate, ComparedSettings, MetricEstimates, StudyResults
from copra_fl.reporting.figures import study as figures
from copra_fl.reporting.figures.study import gains_against, pearson, predictors
from copra_fl.reporting.grid import rank_methods, ranking_table, rate_regret, regret_table
from copra_fl.reporting.results import load_comparison
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.study import render, table, validation_accuracies, write
from experiments.findings import studies
from tests.support.browser import check_page, needs_chromium
from tests.support.run_folders import write_run


def cell_folder(directory: Path) -> Path:
    """Write a finished cell: two methods, two rates, tuning seeds 0 and 1, test seeds 0, 1 and 2."""
    validation = {
        "lora@0.002": [0.3, 0.5],
        "lora@0.01": [0.35, 0.35],
        "copra@0.002": [0.2, 0.3],
        "copra@0.01": [0.4, 0.1],
    }
    cell = directory / "iid" / "3x50"
    for name, accuracies in validation.items():
        for seed, accuracy in enumerate(accuracies):
            folder = cell / "rates" / f"{name}-seed{seed}"
            write_run(folder, name.partition("@")[0], seed)
            summary = json.loads((folder / "summary.json").read_text())
            summary["validation"]["accuracy"] = accuracy
            (folder / "summary.json").write_text(json.dumps(summary))
    (cell / "rates/comparison.toml").write_text(f"methods = {json.dumps(list(validation))}\nseeds = [0, 1]\n")
    for method in ("lora", "copra"):
        for seed in range(3):
            write_run(cell / "test" / f"{method}-seed{seed}", method, seed)
    (cell / "test/comparison.toml").write_text('methods = ["lora", "copra"]\nseeds = [0, 1, 2]\n')
    return cell


def test_rates_are_means_over_tuning_seeds_and_unfinished_ones_are_left_out(tmp_path: Path) -> None:
    cell = cell_folder(tmp_path)
    accuracies = validation_accuracies(load_comparison(cell / "rates"))
    assert accuracies == {"lora": {0.002: 0.4, 0.01: 0.35}, "copra": {0.002: 0.25, 0.01: 0.25}}
    (cell / "rates/copra@0.002-seed1/summary.json").unlink()
    assert validation_accuracies(load_comparison(cell / "rates"))["copra"] == {0.01: 0.25}


def test_results_are_those_of_scipy(tmp_path: Path) -> None:
    cell = cell_folder(tmp_path)
    results = write(tmp_path, [cell], "copra-fl study mine")
    assert StudyResults.from_json((tmp_path / "results.json").read_text()) == results
    assert results.cells[0].rates["lora"].chosen == 0.002
    accuracies = {
        method: [
            json.loads((cell / f"test/{method}-seed{seed}/summary.json").read_text())["test"]["accuracy"]
            for seed in range(3)
        ]
        for method in ("lora", "copra")
    }
    differences = np.subtract(accuracies["copra"], accuracies["lora"])
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    gain = results.cells[0].differences["copra"].get("test_accuracy")
    assert gain.mean == pytest.approx(differences.mean()) and gain.interval == pytest.approx(tuple(interval))
    lora = table(results).rows[0]
    assert lora[:3] == ["3x50, iid", "lora", "0.002"] and re.fullmatch(
        r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", lora[-1]
    )
    gaps = results.cells[0].differences["copra"].get("merge_gap_accuracy").values
    points = gains_against(results, "merge_gap_accuracy")
    assert pearson(points) == pytest.approx(stats.pearsonr(gaps, differences).statistic)


def test_a_method_has_the_same_color_and_symbol_in_every_chart() -> None:
    """Also where the baseline is left out, or a method that trains the head alone."""
    _, results = studies()["headline"]
    makers = (figures.gains, figures.accuracies, figures.rates, figures.predictors)
    charts = [figure.chart for make in makers for figure in make(results)]
    looks: dict[str, set[tuple[str, str]]] = {}
    for chart in charts:
        for trace in chart.data:
            color = trace.line.color or trace.marker.color
            looks.setdefault(trace.name, set()).add((color, trace.marker.symbol))
    assert looks.keys() == results.cells[0].methods.keys() and all(len(of_method) == 1 for of_method in looks.values())


def test_a_page_names_the_models_and_data_of_all_cells() -> None:
    _, results = studies()["passes-depths"]
    assert "fractal-vit on fashion-mnist and minilm on health-tweets · copra-fl study passes" in render(
        "depths", results
    )


def hand_made_cell(
    regime: str, accuracies: dict[str, list[float]], searches: dict[str, dict[str, float]], baseline: str = "a"
) -> CellResults:
    """Return a cell with test accuracies by method and seed, and validation accuracies by method and rate."""

    def estimates(values: list[float]) -> MetricEstimates:
        measured = {"test_accuracy": values, "bytes": [2e6, 4e6], "seconds": [10.0, 20.0]}
        return MetricEstimates(seeds=(0, 1), **{name: estimate(of_seeds) for name, of_seeds in measured.items()})

    return CellResults(
        split="iid",
        regime=regime,
        tuning_seeds=(10,),
        rates={
            method: ChosenRate(chosen=float(max(search, key=search.__getitem__)), validation_accuracy=search)
            for method, search in searches.items()
        },
        baseline=baseline,
        seeds=(0, 1),
        methods={method: estimates(values) for method, values in accuracies.items()},
        differences={
            method: estimates(np.subtract(values, accuracies[baseline]).tolist())
            for method, values in accuracies.items()
            if method != baseline
        },
        personal=(),
        settings=ComparedSettings(common={}, differing={"local-training": {"c": "head"}}),
        unfinished=(),
    )


#: validation accuracies of two cells: method -> rate -> accuracy
SEARCHES = (
    {"a": {"0.1": 0.5, "0.2": 0.6, "0.4": 0.3}, "b": {"0.1": 0.2, "0.2": 0.2}, "c": {"0.8": 0.1}},
    {"a": {"0.1": 0.4, "0.2": 0.35}, "b": {"0.2": 0.1, "0.4": 0.1}, "c": {"0.8": 0.1}},
)


def test_the_ranking_over_cells_by_hand() -> None:
    """Means 0.6, 0.5, 0.5 and 0.3, 0.4, 0.1: b and c share the places 2 and 3 of the first cell.

    Accuracies of a over both cells are 0.35 with seed 0 and 0.55 with seed 1: mean 0.45. Two seeds have no interval.
    """
    cells = [
        hand_made_cell("1x2", {"a": [0.5, 0.7], "b": [0.4, 0.6], "c": [0.4, 0.6]}, SEARCHES[0]),
        hand_made_cell("3x4", {"a": [0.2, 0.4], "b": [0.3, 0.5], "c": [0.1, 0.1]}, SEARCHES[1]),
    ]
    a, b, c = rank_methods(cells)
    assert (a.method, a.ranks, a.mean_rank) == ("a", {"1x2, iid": 1, "3x4, iid": 2}, 1.5)
    assert (b.method, b.mean_rank, c.method, c.mean_rank) == ("b", 1.75, "c", 2.75)
    assert a.test_accuracy.mean == pytest.approx(0.45)
    assert a.test_accuracy.interval is None
    assert (a.bytes, a.flops, a.seconds) == (3e6, None, 15)
    (shown,) = ranking_table(cells, (a, b, c))
    assert shown.header[3:] == ["minus a: 1x2, iid", "minus a: 3x4, iid", "MB up and down", "seconds"]
    assert list(shown.rows[1]) == ["b", "1.8", "45.0", "−10.0", "+10.0", "3.0", "15"]
    assert rank_methods(cells[:1]) == () and ranking_table(cells, ()) == []
    without_c = hand_made_cell("5x6", {"a": [0.5, 0.7], "b": [0.4, 0.6]}, SEARCHES[0])
    ranked = rank_methods([*cells, without_c])
    assert [row.method for row in ranked] == ["a", "b"]
    assert "without a test accuracy in every cell: c." in ranking_table([*cells, without_c], ranked)[0].caption


def test_the_regret_over_rates_by_hand() -> None:
    """Shared by a and b, without the head of c: rates 0.1 and 0.2 in the first cell, 0.2 in the second.

    a: means 0.55 and 0.35, worst 0.5 and 0.35. In both cells it tried 0.1, which loses 0.1 and 0, and 0.2, which loses
    0 and 0.05.
    """
    accuracies = {"a": [0.5, 0.7], "b": [0.4, 0.6], "c": [0.4, 0.6]}
    regrets = rate_regret([hand_made_cell(f"{n}x2", accuracies, search) for n, search in enumerate(SEARCHES)])
    assert list(regrets) == ["a", "b"]
    a, b = regrets["a"], regrets["b"]
    assert (a.mean, a.worst) == (pytest.approx(0.45), pytest.approx(0.425))
    assert a.by_rate == {"0.1": pytest.approx(0.05), "0.2": pytest.approx(0.025)}
    assert (a.fixed_rate, a.regret, a.worst_regret) == (0.2, pytest.approx(0.025), pytest.approx(0.05))
    assert (b.mean, b.fixed_rate, b.regret, b.worst_regret) == (pytest.approx(0.15), 0.2, 0, 0)
    assert list(regret_table(regrets, 2).rows[0]) == ["a", "45.0", "42.5", "0.2", "2.5", "5.0"]


@needs_chromium
def test_the_report_opens_in_a_browser(tmp_path: Path) -> None:
    cell = cell_folder(tmp_path)
    results = write(tmp_path, [cell], "copra-fl study mine")
    html = (tmp_path / "report.html").read_text()
    assert "iid" in html and "the best rate of lora, 0.002, is at the edge of the rates tried" in html
    check_page(tmp_path / "report.html", 6 + len(predictors(results)))
