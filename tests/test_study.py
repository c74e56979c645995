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

from copra_fl.config import ConfigError
from copra_fl.reporting import results
from copra_fl.reporting.results import Comparison
from copra_fl.reporting.study import best_rate, rates_to_try, tuned_name
from copra_fl.simulation import preflight, study
from copra_fl.simulation.comparison import load_plan, run_names
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe, built_in_recipes, read_toml
from copra_fl.simulation.study import (
    StudyCell,
    choose_cells,
    finish_comparison,
    read_grids,
    run_test,
    sample_configs,
    tune,
)
from tests.support.command_line import run_command
from tests.support.real_runs import RealRun
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
    tables = {
        "tuning": {"seeds": [10], "learning-rates": [0.002, 0.01]},
        "splits": {"iid": {"partitioner": "iid"}},
        "regimes": {"2x3": {"num-rounds": 2, "local-steps": 3}},
        "grids": {"first": GRID},
    }
    return Recipe(tiny, study=tables | changes)


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
        ({"grids": {"first": GRID | {"methods": ["lora", "lora"]}}}, "methods = .* must have each value once"),
        ({"foo": {}}, "\\[study\\]: unknown key 'foo'"),
        ({"splits": {"../iid": {}}}, "\\[study.splits\\]: '../iid' must have letters, digits"),
        ({"splits": {"iid": {"learning-rate": 1}}}, "\\[study.splits.iid\\]: learning-rate = 1: leave it out"),
        ({"regimes": {"2x3": {"seed": 3}}}, "\\[study.regimes.2x3\\]: seed = 3: leave it out; .* from the seeds of"),
        (
            {"regimes": {"2x3": {"methods": {"lora": {"learning-rate": 1}}}}},
            "\\[study.regimes.2x3.methods.lora\\]: learning-rate = 1",
        ),
        ({"grids": {"first": GRID | {"tuning": {"seeds": [3, 1]}}}}, "first\\]: seeds 1 of the tuning must not"),
        (
            {"regimes": {"2x3": {"num-rounds": 2, "methods": {"haed": {"num-rounds": 4}}}}},
            "\\[study.regimes.2x3.methods\\]: unknown method 'haed'. Did you mean 'head'",
        ),
    ],
)
def test_a_wrong_key_of_a_study_is_named(tiny: Settings, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(make_study(tiny, **changes))


TUNING = {"seeds": [10], "learning-rates": [0.002, 0.01]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tuning": TUNING | {"learning-rates": 0.001}},
            "tuning.learning-rates = 0.001 must be a list",
        ),
        (
            {"tuning": TUNING | {"learning-rates": []}},
            "tuning.learning-rates = [] must be a list with at least one value",
        ),
        (
            {"tuning": TUNING | {"learning-rates": [-1]}},
            "tuning.learning-rates: learning-rate = -1.0 must be more than 0",
        ),
        ({"tuning": TUNING | {"seeds": 5}}, "study.tuning.seeds = 5 must be a list"),
        ({"tuning": TUNING | {"settings": 3}}, "study.tuning.settings = 3 must be a table of settings"),
        ({"tuning": TUNING | {"settings": {"seed": 3}}}, "[study.tuning.settings]: seed = 3: leave it out"),
        ({"tuning": 3}, "study.tuning = 3 must be a table"),
        ({"tuning": [TUNING]}, "must be a table of settings, as in [study.tuning]"),
        ({"splits": {"a": 0.5}}, "study.splits.a = 0.5 must be a table"),
        ({"grids": {"g": 3}}, "study.grids.g = 3 must be a table"),
        ({"grids": {"g": GRID | {"seeds": 0}}}, "study.grids.g.seeds = 0 must be a list"),
        ({"grids": {"g": GRID | {"seeds": [0, 0]}}}, "study.grids.g.seeds = [0, 0] must have each value once"),
        ({"grids": {"g": GRID | {"splits": []}}}, "study.grids.g.splits = [] must be a list"),
        ({"grids": {"g": GRID | {"methods": [1]}}}, "study.grids.g.methods: name = 1 must be a string"),
        ({"grids": {"g": GRID | {"methods": "lora"}}}, "study.grids.g.methods = 'lora' must be a list"),
        ({"regimes": {"2x3": {"methods": {"lora": 2}}}}, "study.regimes.2x3.methods.lora = 2 must be a table"),
    ],
)
def test_a_value_of_a_wrong_type_in_a_study_is_named(tiny: Settings, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cells(make_study(tiny, **changes))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"study": 3}, "study = 3 must be a table"),
        ({"methods": ["lora"]}, "methods = ['lora'] must be a table of settings, as in [methods]"),
        ({"methods": {"lora": 3}}, "methods.lora = 3 must be a table of settings, as in [methods.lora]"),
    ],
)
def test_a_value_in_place_of_a_table_of_a_recipe_is_named(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Recipe.of(table, {})


def test_no_setting_replaces_the_rate_that_a_study_searches(tiny: Settings) -> None:
    """The rate of `head` is head-learning-rate, which other methods may set."""
    rate = {"head-learning-rate": 0.1}
    for changes in (
        {"tuning": TUNING | {"settings": rate}},
        {"regimes": {"2x3": {"num-rounds": 2, "methods": {"head": rate}}}},
    ):
        (cell,) = cells(make_study(tiny, **changes))
        with pytest.raises(ConfigError, match="iid/2x3: head-learning-rate = 0.1 .* of 'head' .* the study chooses it"):
            list(sample_configs(cell))
    (cell,) = cells(make_study(tiny, regimes={"2x3": {"num-rounds": 2, "methods": {"lora": rate}}}))
    assert list(sample_configs(cell))[1].training.head_learning_rate == 0.1


def test_a_search_without_validation_accuracies_ends(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = iter([None])
    (cell,) = cells(make_study(tiny))
    monkeypatch.setattr(study, "finish_comparison", lambda *arguments: next(rounds))
    monkeypatch.setattr(results, "load_comparison", lambda folder: Comparison(folder, {}, [10]))
    with pytest.raises(ConfigError, match="iid/2x3: method 'lora' has no validation accuracy at .* 0.002 and 0.01"):
        tune(cell, Console(quiet=True), WorkerRequest(1, None, None))


@pytest.mark.parametrize("name", [name for name, path in built_in_recipes().items() if "study" in read_toml(path)])
def test_every_grid_of_a_built_in_study_is_valid(name: str) -> None:
    of_grids = [of_grid for _, of_grid in read_grids(Recipe.read(name, []), None, Path("out"))]
    assert all(list(sample_configs(cell)) for of_grid in of_grids for cell in of_grid)


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
