"""A study: choice of learning rates, rejected settings, reports, and a real study that is killed and continued."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from copra_fl.config import ConfigError
from copra_fl.records import CellResults, ChosenRate, ComparedSettings, MetricEstimates, StudyResults
from copra_fl.reporting.figures import study as figures
from copra_fl.reporting.figures.study import gains_against, pearson, predictors
from copra_fl.reporting.grid import rank_methods, ranking_table, rate_regret, regret_table
from copra_fl.reporting.results import load_comparison
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.study import best_rate, rates_to_try, render, table, tuned_name, validation_accuracies, write
from copra_fl.simulation import preflight
from copra_fl.simulation.comparison import load_plan, run_names
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.study import StudyCell, choose_cells, finish_comparison, read_grids, run_test, sample_configs
from experiments.findings import studies
from tests.support.browser import check_page, needs_chromium
from tests.support.command_line import run_command
from tests.support.real_runs import RealRun
from tests.support.run_folders import write_run
from tests.support.tiny import Settings

RATES = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05]


@pytest.mark.parametrize("peak", RATES)
def test_the_search_finds_the_best_of_the_whole_grid_where_accuracy_has_one_peak(peak: float) -> None:
    accuracy = {rate: -abs(np.log(rate / peak)) for rate in RATES}
    tried: dict[float, float] = {}
    while more := rates_to_try(RATES, tried):
        tried |= {rate: accuracy[rate] for rate in more}
    assert best_rate(tried) == max(accuracy, key=accuracy.__getitem__) == peak
    place = RATES.index(peak)
    assert tried.keys() >= set(RATES[max(0, place - 1) : place + 2]), "both neighbours of the best were tried"
    assert len(tried) < len(RATES)


@pytest.mark.parametrize("rate", [0.005, 1e-5, 10**-3.5, 1])
def test_the_name_of_a_tuned_method_has_the_whole_rate(rate: float) -> None:
    assert float(tuned_name("lora", rate).rpartition("@")[2]) == rate


def test_the_lowest_of_equally_good_rates_is_chosen() -> None:
    assert best_rate({0.02: 0.4, 0.005: 0.4, 0.01: 0.3}) == 0.005


GRID = {"methods": ["lora", "head"], "seeds": [0, 1], "splits": ["iid"], "regimes": ["2x3"]}


def make_study(tiny: Settings, **changes: Settings) -> Recipe:
    """Return a study of two methods in one cell."""
    study = {
        "tuning": {"seeds": [10], "learning-rates": [0.002, 0.01]},
        "splits": {"iid": {"partitioner": "iid"}},
        "regimes": {"2x3": {"num-rounds": 2, "local-steps": 3}},
        "grids": {"first": GRID},
    }
    return Recipe(tiny, study=study | changes)


def cells(recipe: Recipe, grids: str | None = None) -> list[StudyCell]:
    return [cell for _, grid_cells in read_grids(recipe, grids, Path("out")) for cell in grid_cells]


def test_tuning_and_test_runs_differ_in_rate_seed_and_tuning_settings_only(tiny: Settings) -> None:
    (cell,) = cells(make_study(tiny, tuning={"seeds": [10], "learning-rates": [0.01], "settings": {"path-pairs": 0}}))
    tuning, test = cell.tuning_config("lora", 0.01, 10), cell.config("lora", 0.005, 0)
    changed = {difference.partition(":")[0] for difference in tuning.differences(test)}
    assert changed == {"learning-rate", "seed", "path-pairs", "final-test"}
    assert not tuning.evaluation.final_test, "test data serve for the last number only"
    head = cell.config("head", 0.005, 0).training
    assert (
        head.head_learning_rate == 0.005
        and head.learning_rate == test.changed(learning_rate=2e-3).training.learning_rate
    )
    assert cell.directory == Path("out/first/iid/2x3")


def test_a_grid_replaces_keys_of_the_tuning(tiny: Settings) -> None:
    grids = {"first": GRID, "second": GRID | {"tuning": {"learning-rates": [0.1, 0.2], "settings": {"path-pairs": 0}}}}
    first, second = cells(make_study(tiny, grids=grids))
    assert first.tuning == {"seeds": [10], "learning-rates": [0.002, 0.01], "settings": {}}
    assert second.tuning == {"seeds": [10], "learning-rates": [0.1, 0.2], "settings": {"path-pairs": 0}}
    assert second.tuning_config("lora", 0.1, 10).evaluation.path_pairs == 0


def test_a_regime_has_settings_of_single_methods(tiny: Settings) -> None:
    """They override the regime and the method's file, and are overridden by --set."""
    regime = {"num-rounds": 2, "local-steps": 3, "methods": {"lora": {"num-rounds": 4, "local-training": "copra"}}}
    recipe = make_study(tiny, regimes={"2x3": regime})
    (cell,) = cells(recipe)
    lora, head = (cell.config(method, 0.01, 0) for method in ("lora", "head"))
    assert (lora.federation.num_rounds, lora.copra.local_training, lora.training.local_steps) == (4, "copra", 3)
    assert (head.federation.num_rounds, head.copra.local_training) == (2, "head")
    (cell,) = cells(replace(recipe, overrides={"num-rounds": 1}))
    assert cell.config("lora", 0.01, 0).federation.num_rounds == 1


def test_runs_that_choose_a_rate_have_no_target(tiny: Settings) -> None:
    (cell,) = cells(make_study(tiny | {"target-accuracy": 0.5}))
    with pytest.raises(ConfigError, match="= 0.5 ends the runs that choose .*; set target-accuracy = 0"):
        list(sample_configs(cell))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {}}, "no table \\[study.splits\\]"),
        ({"splits": {"idi": {}}}, "unknown split 'iid'. Did you mean 'idi'"),
        ({"tuning": {"seeds": [1]}}, "\\[study.tuning\\] lacks learning-rates"),
        ({"tuning": {"seeds": [1], "learning-rates": [1], "rate": 2}}, "\\[study.tuning\\]: unknown key 'rate'"),
        ({"grids": {"first": {"methods": ["lora"]}}}, "\\[study.grids.first\\] lacks seeds, splits, regimes"),
        ({"grids": {"first": GRID | {"tuning": {"rate": 2}}}}, "\\[study.grids.first.tuning\\]: unknown key 'rate'"),
        ({"grids": {"first": GRID | {"methods": ["lora", "lora"]}}}, "method 'lora' is named twice"),
        (
            {"regimes": {"2x3": {"num-rounds": 2, "methods": {"haed": {"num-rounds": 4}}}}},
            "\\[study.regimes.2x3.methods\\]: unknown method 'haed'. Did you mean 'head'",
        ),
    ],
)
def test_a_wrong_key_of_a_study_is_named(tiny: Settings, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(make_study(tiny, **changes))


def test_an_unknown_grid_is_named(tiny: Settings) -> None:
    with pytest.raises(ConfigError, match="unknown grid 'frist'. Did you mean 'first'"):
        cells(make_study(tiny), "frist")


def test_named_cells_run_and_finished_ones_stay_in_the_report(tiny: Settings, tmp_path: Path) -> None:
    grids = {name: GRID | {"regimes": regimes} for name, regimes in (("both", ["2x3", "3x2"]), ("one", ["2x3"]))}
    recipe = make_study(tiny, grids=grids, regimes={"2x3": {"num-rounds": 2}, "3x2": {"num-rounds": 3}})
    of_grids = {grid: list(of_grid) for grid, of_grid in read_grids(recipe, None, tmp_path)}

    def chosen(names: str | None) -> dict[str, list[str]]:
        return {grid: [cell.name for cell in of_grid] for grid, of_grid in choose_cells(of_grids, names).items()}

    everything = {"both": ["iid/2x3", "iid/3x2"], "one": ["iid/2x3"]}
    assert chosen(None) == chosen("iid/3x2, iid/2x3") == everything
    assert chosen("iid/2x3") == {"both": ["iid/2x3"], "one": ["iid/2x3"]}
    for run in run_names(GRID["methods"], GRID["seeds"]):
        assert chosen("iid/3x2") == {"both": ["iid/3x2"]}, "a cell has finished with its last run"
        (tmp_path / "both/iid/2x3/test" / run).mkdir(parents=True)
        (tmp_path / "both/iid/2x3/test" / run / "summary.json").touch()
    assert chosen("iid/3x2") == {"both": ["iid/2x3", "iid/3x2"]}
    with pytest.raises(ConfigError, match="unknown cell 'iid/2x33'. Did you mean 'iid/2x3'"):
        chosen("iid/2x33")


def test_a_rule_without_a_global_model_is_rejected(tiny: Settings) -> None:
    grid = {"methods": ["fedsa-lora"], "seeds": [0], "splits": ["iid"], "regimes": ["2x3"]}
    (cell,) = cells(make_study(tiny, grids={"first": grid}))
    with pytest.raises(ConfigError, match="no global model to choose the learning rate of 'fedsa-lora' by"):
        list(sample_configs(cell))


def test_a_bad_setting_in_the_last_cell_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "experiments/smoke.toml").read_text()
    text = text.replace("[study.regimes]", "[study.regimes]\nbad = { local-stepps = 2 }").replace(
        '["1x2"]', '["1x2", "bad"]'
    )
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    output = run_command("study", "mine.toml", code=2)
    assert "unknown configuration key 'local-stepps'. Did you mean 'local-steps'" in output.message
    assert not (tmp_path / "runs").exists()


def test_finished_runs_of_other_settings_are_no_results(tiny: Settings, tmp_path: Path) -> None:
    (cell,) = cells(make_study(tiny))
    configs = {run: cell.config(method, 0.01, seed) for run, (method, seed) in run_names(cell.methods, [0, 1]).items()}
    console, request = Console(quiet=True), WorkerRequest(1, None, None)
    arguments = list(cell.methods), [0, 1], configs, console, request
    for run, config in zip(configs, preflight.check(configs.values(), console, request), strict=True):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.toml").write_text(config.to_toml())
        (tmp_path / run / "summary.json").touch()
    finish_comparison(tmp_path, *arguments)
    assert load_plan(tmp_path)[:2] == (["lora", "head"], [0, 1])
    configs["head-seed1"] = configs["head-seed1"].changed(local_steps=4)
    with pytest.raises(ConfigError, match=r"cannot resume .*head-seed1 with a changed configuration: local-steps"):
        finish_comparison(tmp_path, *arguments)


def test_a_rate_that_is_chosen_anew_names_the_runs_to_remove(tiny: Settings, tmp_path: Path) -> None:
    """A rate or a tuning seed was added to the study after its test runs had finished."""
    (cell,) = cells(make_study(tiny))
    cell = replace(cell, directory=tmp_path)
    console, request = Console(quiet=True), WorkerRequest(1, None, None)
    for run, (method, seed) in run_names(cell.methods, cell.seeds).items():
        (config,) = preflight.check([cell.config(method, 0.01, seed)], console, request)
        (tmp_path / "test" / run).mkdir(parents=True)
        (tmp_path / "test" / run / "config.toml").write_text(config.to_toml())
        (tmp_path / "test" / run / "summary.json").touch()
    with pytest.raises(ConfigError, match="the chosen learning rate has changed") as raised:
        run_test(cell, {"lora": 0.01, "head": 0.002}, console, request)
    assert str(raised.value).splitlines()[1:] == [
        f"  {tmp_path}/test/head-seed{seed}: head-learning-rate 0.01 -> 0.002" for seed in (0, 1)
    ]
    with pytest.raises(ConfigError, match=f"{tmp_path}/test/lora-seed0: learning-rate 0.01 -> 0.002"):
        run_test(cell, {"lora": 0.002, "head": 0.01}, console, request)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=3", "--set seed=3 has no effect here: a study's seeds are those"),
        ("learning-rate=0.1", "--set learning-rate=0.1 has no effect here: a study searches it"),
        ("p0=0.5", "p0 = 0.5 has no effect with local-training ="),
    ],
)
def test_a_setting_without_effect_is_rejected(setting: str, message: str, study_file: Path, tmp_path: Path) -> None:
    """The study has the methods `lora` and `head`."""
    assert message in run_command("study", study_file, "--set", setting, "--output", tmp_path / "runs", code=2).message


def test_a_recipe_can_define_a_method() -> None:
    recipe = Recipe({"rank": 3}, {"slow": {"local-training": "copra", "p0": 0.2}, "lora": {"rank": 5}})
    assert (recipe.config("slow").copra.p0, recipe.config("slow").model.rank) == (0.2, 3)
    assert recipe.config("flora+slow").aggregation.rule == "flora" and recipe.config("lora").model.rank == 5
    with pytest.raises(ConfigError, match="unknown method 'fast'"):
        recipe.config("fast")


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

    Accuracies of a over both cells are 0.35 with seed 0 and 0.55 with seed 1: mean 0.45, s = 0.141421, t(0.975, 1) =
    12.7062, half width 12.7062 * 0.141421 / sqrt(2) = 1.27062.
    """
    cells = [
        hand_made_cell("1x2", {"a": [0.5, 0.7], "b": [0.4, 0.6], "c": [0.4, 0.6]}, SEARCHES[0]),
        hand_made_cell("3x4", {"a": [0.2, 0.4], "b": [0.3, 0.5], "c": [0.1, 0.1]}, SEARCHES[1]),
    ]
    a, b, c = rank_methods(cells)
    assert (a.method, a.ranks, a.mean_rank) == ("a", {"1x2, iid": 1, "3x4, iid": 2}, 1.5)
    assert (b.method, b.mean_rank, c.method, c.mean_rank) == ("b", 1.75, "c", 2.75)
    assert a.test_accuracy.mean == pytest.approx(0.45)
    assert a.test_accuracy.interval == pytest.approx((0.45 - 1.27062, 0.45 + 1.27062), abs=1e-5)
    assert (a.bytes, a.flops, a.seconds) == (3e6, None, 15)
    (shown,) = ranking_table(cells, (a, b, c))
    assert shown.header[3:] == ["minus a: 1x2, iid", "minus a: 3x4, iid", "MB up and down", "seconds"]
    assert list(shown.rows[1]) == [
        "b", "1.8", "45.0 [−82.1, 172.1]", "−10.0 [−10.0, −10.0]", "+10.0 [+10.0, +10.0]", "3.0", "15",
    ]  # fmt: skip
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


@pytest.fixture
def study_file(tmp_path: Path, tiny: Settings) -> Path:
    """The study of `make_study`, as a file."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in tiny.items()]
    path = tmp_path / "mine.toml"
    path.write_text(
        "\n".join(lines)
        + """
[study.tuning]
seeds = [10]
learning-rates = [0.002, 0.01, 0.05]
[study.splits]
iid = { partitioner = "iid" }
[study.regimes]
2x3 = { num-rounds = 2, local-steps = 3 }
[study.grids.first]
methods = ["lora", "head"]
seeds = [0, 1]
splits = ["iid"]
regimes = ["2x3"]
"""
    )
    return path


@pytest.mark.slow
def test_a_study_is_continued_after_a_kill_without_repeating_finished_runs(study_file: Path, tmp_path: Path) -> None:
    arguments = ["study", str(study_file), "--output", "runs"]
    rates, test = (tmp_path / "runs/first/iid/2x3" / stage for stage in ("rates", "test"))
    killed = RealRun(arguments, tmp_path)
    killed.wait_until(lambda: (rates / "lora@0.01-seed10/summary.json").exists(), "the second run")
    killed.process.send_signal(signal.SIGKILL)
    killed.wait_until(lambda: not killed.processes(), "no process left")
    done = {path: path.stat().st_mtime_ns for path in rates.glob("*/summary.json")}
    assert 2 <= len(done) < 6
    RealRun(arguments, tmp_path).finish()
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished runs were not run again"
    results = json.loads((tmp_path / "runs/first/results.json").read_text())["cells"][0]
    for method, key in (("lora", "learning-rate"), ("head", "head-learning-rate")):
        accuracies = {
            rate: json.loads((rates / f"{method}@{rate}-seed10/summary.json").read_text())["validation"]["accuracy"]
            for rate in ("0.002", "0.01", "0.05")
        }
        best = max(accuracies, key=accuracies.__getitem__)
        assert results["rates"][method]["chosen"] == float(best)
        assert f"\n{key} = {best}\n" in (test / f"{method}-seed1/config.toml").read_text()
    study_file.write_text(study_file.read_text().replace("seeds = [0, 1]", "seeds = [1]"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("journal.jsonl")}
    RealRun(arguments, tmp_path).finish()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("journal.jsonl")} == before
    results = json.loads((tmp_path / "runs/first/results.json").read_text())["cells"][0]
    assert results["seeds"] == [1] and results["unfinished"] == []
