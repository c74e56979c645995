"""Results of comparisons: numbers by hand, tables and verdicts, figures. The page: `test_report_page`."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import plotly.graph_objects as go
import pytest
from rich.console import Console

from copra_fl.records import (
    ClientEvaluation,
    Estimate,
    RunSummary,
    UnfinishedRun,
)
from copra_fl.reporting import export
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.figures.canvas import by_round, styles
from copra_fl.reporting.html import STYLES, Figure, Section, pack, unpack
from copra_fl.reporting.report import all_results, render
from copra_fl.reporting.results import load_comparison, load_run, method_name
from copra_fl.reporting.statistics import estimate, metrics, possible_range, summarize
from copra_fl.reporting.tables import COLUMNS, no_better_than_majority, ordered, results_table, rows
from copra_fl.reporting.terminal import results
from copra_fl.reporting.verdict import verdict
from tests.support.command_line import run_command
from tests.support.run_folders import figures_by_title, final_accuracies, many_methods, write_comparison, write_run


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "comparison", seeds=[0, 1, 2])


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "many", [0, 1], many_methods())


# --- numbers by hand ----------------------------------------------------------------------


def test_interval_of_three_seeds_by_hand() -> None:
    """mean 2, s = 1, t(0.975, 2) = 4.302653: the half width is 4.302653 / sqrt(3) = 2.484138."""
    of_three = estimate([1.0, 2.0, 3.0])
    assert of_three.mean == 2.0
    assert of_three.interval == pytest.approx((-0.484138, 4.484138), abs=1e-6)


@pytest.mark.parametrize("values", [(0.4,), (0.4, 0.4), (0.3, 0.5)])
def test_fewer_than_three_seeds_have_a_mean_and_no_interval(values: tuple[float, ...]) -> None:
    assert estimate(values) == Estimate(mean=0.4, interval=None, values=values)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_diverged_seed_leaves_no_mean(bad: float | None) -> None:
    """The mean of the other seeds would make a method that diverges look good."""
    assert estimate([1.0, bad, 3.0]) == Estimate(mean=None, interval=None, values=(1.0, None, 3.0))


def test_a_metric_without_any_value_is_left_out_and_a_diverged_one_is_kept(comparison: Path) -> None:
    for path in comparison.glob("copra-seed*/summary.json"):
        summary = RunSummary.from_json(path.read_bytes())
        assert summary.test is not None
        path.write_text(
            summary.model_copy(update={"test": summary.test.model_copy(update={"loss": math.nan})}).to_json()
        )
    summary = summarize(load_comparison(comparison))
    lora, copra, difference = *summary.methods.values(), summary.differences["copra"]
    assert not {"test_perplexity", "held_out_accuracy"} & (lora.metrics.keys() | copra.metrics.keys())
    for estimates in (copra, difference):
        assert estimates.metrics["test_loss"] == Estimate(mean=None, interval=None, values=(None, None, None))


def test_differences_are_paired_by_seed(comparison: Path) -> None:
    """Accuracies 0.43 - 0.40, 0.45 - 0.43, 0.43 - 0.39: mean 0.03, s = 0.01, half width 0.01 * 2.484138."""
    difference = summarize(load_comparison(comparison)).differences["copra"].get("test_accuracy")
    assert difference.values == pytest.approx([0.03, 0.02, 0.04])
    assert difference.mean == pytest.approx(0.03)
    assert difference.interval == pytest.approx((0.03 - 0.02484138, 0.03 + 0.02484138))


def test_barriers_are_means_over_pairs(comparison: Path) -> None:
    """A parabola of height 0.15 on a straight line: every pair's barrier is 0.15; below the line it is 0."""
    methods = summarize(load_comparison(comparison)).methods
    assert methods["lora"].get("barrier_entezari").mean == pytest.approx(0.15)
    assert methods["copra"].get("barrier_entezari").mean == pytest.approx(0)


def test_client_accuracy_is_weighted_by_examples(tmp_path: Path) -> None:
    """(0.5 * 30 + 0.9 * 10) / 40 = 0.6; a personal method has no other accuracy."""
    write_run(tmp_path / "run", "fedsa-lora", 0)
    clients = [
        ClientEvaluation(client=0, loss=1, accuracy=0.5, examples=30),
        ClientEvaluation(client=1, loss=1, accuracy=0.9, examples=10),
    ]
    run = load_run(tmp_path / "run")
    assert run.summary is not None
    measured = metrics(replace(run, summary=run.summary.model_copy(update={"clients": clients})))
    assert measured["client_accuracy"] == pytest.approx(0.6)
    absent = ("test_accuracy", "validation_loss", "merge_gap_accuracy", "aggregation_error", "barrier_frankle")
    assert {measured[name] for name in absent} == {None}


# --- tables and verdicts ------------------------------------------------------------------


def test_verdict_follows_the_interval(tmp_path: Path, comparison: Path) -> None:
    three = verdict(summarize(load_comparison(comparison)))
    assert (three.metric, three.above, three.below + three.level + three.too_few) == ("test_accuracy", ("copra",), ())
    assert three.text.startswith("copra ends 3.0 points above lora in test accuracy (95 % interval +0.5 to +5.5 points")
    two = verdict(summarize(load_comparison(write_comparison(tmp_path / "two", seeds=[0, 1]))))
    assert (two.above, two.too_few) == ((), ("copra",))
    too_few = (
        "Too few seeds to tell: copra ends 2.5 points above lora in test accuracy (2 paired seeds); run 3 or more."
    )
    assert two.text == too_few
    one = verdict(summarize(load_comparison(write_comparison(tmp_path / "one", seeds=[0]))))
    assert one.text.startswith("Too few seeds to tell: ") and "(1 paired seed)" in one.text


def test_a_method_with_two_seeds_is_not_called_better_because_another_has_three(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "three", [0, 1, 2], ["lora", "copra", "flora"])
    shutil.rmtree(folder / "copra-seed2")
    summary = summarize(load_comparison(folder))
    estimates = summary.differences["copra"]
    assert estimates.get("test_accuracy").interval is None
    text = verdict(summary).text
    assert "Too few seeds to tell whether copra differs from lora: 2 paired seeds" in text
    assert not [sentence for sentence in text.split(". ") if "Significantly" in sentence and "copra" in sentence]


@pytest.mark.parametrize("methods", [["lora"], ["lora", "copra"], ["lora", "copra", "flora"]])
def test_runs_without_a_final_test_are_compared_on_validation_data(tmp_path: Path, methods: list[str]) -> None:
    folder = write_comparison(tmp_path / "untested", [0, 1, 2], methods)
    means = {}
    for method in methods:
        accuracies = []
        for path in folder.glob(f"{method}-seed*/summary.json"):
            summary = json.loads(path.read_text())
            accuracies.append(summary["validation"]["accuracy"])
            path.write_text(json.dumps(summary | {"test": None, "base_test": None, "base_validation": None}))
        means[method] = f"{100 * fmean(accuracies):.1f}"
    summary = summarize(load_comparison(folder))
    shown = results_table(summary)
    assert shown.header[1] == "validation accuracy, %" and "test accuracy, %" not in shown.header
    by_method = {row[0]: row[1].partition(" ")[0] for row in shown.rows}
    assert {method: by_method[method] for method in methods} == means
    sentences = verdict(summary).text
    assert verdict(summary).metric == "validation_accuracy"
    assert "validation accuracy" in sentences and "test accuracy" not in sentences


def test_missing_and_unfinished_runs_are_listed_and_not_averaged(comparison: Path) -> None:
    shutil.rmtree(comparison / "copra-seed0")
    (comparison / "lora-seed2" / "summary.json").unlink()
    summary = summarize(load_comparison(comparison))
    assert summary.unfinished == (
        UnfinishedRun(method="lora", seed=2, rounds=3),
        UnfinishedRun(method="copra", seed=0, rounds=0),
    )
    assert summary.methods["lora"].seeds == (0, 1)
    assert summary.methods["copra"].seeds == (1, 2)
    assert summary.differences["copra"].seeds == (1,)


def test_a_comparison_is_shown_while_its_first_run_goes_on(comparison: Path) -> None:
    """`compare` writes the configurations of all runs before the first one starts."""
    for run in comparison.glob("*-seed*"):
        (run / "summary.json").unlink()
        if run.name != "lora-seed0":
            (run / "journal.jsonl").unlink()
    charts = figures_by_title(load_comparison(comparison)).keys()
    assert "Probability of being on" in charts and not any(title.startswith("Activity by layer") for title in charts)


def test_settings_are_common_or_differ(comparison: Path) -> None:
    settings = summarize(load_comparison(comparison)).settings
    assert settings.differing == {
        "local-training": {"lora": "lora", "copra": "copra"},
        "learning-rate": {"lora": 2e-3, "copra": 5e-3},
    }
    assert settings.common["num-clients"] == 8
    assert "seed" not in settings.common


def test_only_differences_have_a_plus_sign(comparison: Path) -> None:
    lora, _, difference = rows(summarize(load_comparison(comparison)), COLUMNS)
    assert lora[0] == "lora" and lora[1].startswith("40.7 [")
    assert difference[:2] == ["copra − lora", "+3.0 [+0.5, +5.5]"]


def test_a_column_of_numbers_is_aligned_right_and_a_column_of_names_left() -> None:
    """Placeholders count as numbers; a name that begins with a digit is a name."""
    shown = DataTable(
        ["cell", "method", "gain", "MB", "size"],
        [["4x60, iid", "lora", "−0.5 [−1.0, +0.0]", "1.5", "5/10"], ["1x2, iid", "head", "–", "1e−05", ""]],
    )
    assert shown.numeric == [False, False, True, True, True]
    assert DataTable(["empty"], []).numeric == [False]


def test_a_table_as_markdown() -> None:
    shown = DataTable(["method", "MB"], [["lora", "1.5"]], caption="Per round.", title="Cost")
    assert shown.markdown() == "## Cost\n\n| method | MB |\n| --- | --- |\n| lora | 1.5 |\n\nPer round.\n"
    assert DataTable(["a"], [["b"]]).markdown() == "| a |\n| --- |\n| b |\n"
    assert DataTable(["a"], [["heart|lungs"]]).markdown() == "| a |\n| --- |\n| heart\\|lungs |\n"


def test_a_table_as_csv_and_latex() -> None:
    shown = DataTable(["method", "gain, %", "MB"], [["a_b", "−0.5 [−1.0, +0.0]", "1"], ["c", "–", "2"]], "Caption.")
    assert shown.csv() == 'method,"gain, %","gain, % low","gain, % high",MB\na_b,-0.5,-1.0,+0.0,1\nc,,,,2\n'
    latex = shown.latex()
    assert "\\caption{Caption.}" in latex and "\\begin{tabular}{lrr}" in latex
    assert "a\\_b & $-$0.5 [$-$1.0, +0.0] & 1 \\\\" in latex and "gain, \\%" in latex


def test_figures_and_tables_are_written_under_their_names(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kaleido: the message names the missing images, and all else is written."""
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    line = Figure("Loss on the line", "Of a probe.", go.Figure().add_scatter(x=[0, 1], y=[3, 4]))
    for run in ("lora-seed0", "copra-seed0"):
        probe = {"title": "Connectivity", "figures": pack([Section("Lines", [line])])}
        (comparison / run / "probe-connectivity.figures.json").write_text(json.dumps(probe))
    message = run_command("report", comparison, "--figures", tmp_path / "figures", code=1).message
    assert "no SVG and PNG: kaleido is not installed. The buttons under the charts of" in message
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"accuracy-by-round.csv", "confusion-with-copra.csv", "results.csv", "results.md", "results.tex"} <= names
    lines = (tmp_path / "figures" / "accuracy-by-round.csv").read_text().splitlines()
    assert lines[0] == "series,x,y,value,error_above,error_below" and len(lines) == 1 + 2 * 3
    assert "seed0" not in " ".join(names) and len(names) > 25
    assert {f"results-of-each-run-{table}.csv" for table in ("runs", "pairs-of-clients")} <= names
    (own, *probed) = ((tmp_path / "figures" / f"loss-on-the-line{end}.csv").read_text() for end in ("", "-2", "-3"))
    assert probed == [line.csv] * 2 and own != line.csv
    titles = [title for title in load_comparison(comparison).figures if title.startswith("Loss on the line")]
    assert titles == ["Loss on the line", "Loss on the line, 2", "Loss on the line, 3"]


def test_a_line_by_round_ends_with_the_first_finished_run(comparison: Path) -> None:
    """Later means would be those of fewer seeds. A run that is under way ends no line."""
    journals = [comparison / f"{method}-seed1" / "journal.jsonl" for method in ("lora", "copra")]
    for path in journals:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    (comparison / "copra-seed1" / "summary.json").unlink()
    chart = figures_by_title(load_comparison(comparison))["Accuracy by round"].chart
    x = {trace.name: list(trace.x) for trace in chart.data if trace.mode == "lines+markers"}
    assert x == {"lora": [1, 2], "copra": [1, 2, 3]}


def test_a_chart_as_csv_also_after_it_was_stored_by_a_probe() -> None:
    """By hand: a line with an interval, a band that is left out, and a heat map of two cells."""
    chart = go.Figure()
    error = {"array": np.array([0.5, 0.25]), "arrayminus": np.array([0.125, 0.0])}
    chart.add_scatter(name="a", x=np.array([1, 2]), y=np.array([3.0, 4.5]), error_y=error)
    chart.add_scatter(x=[1, 2], y=[0, 0], mode="none", fill="toself")
    chart.add_heatmap(x=["u", "v"], y=["w"], z=np.array([[1.5, 2.5]]))
    figure = Figure("Some Chart, %", "Caption.", chart)
    expected = "series,x,y,value,error_above,error_below\na,1,3.0,,0.5,0.125\na,2,4.5,,0.25,0.0\n,u,w,1.5\n,v,w,2.5\n"
    assert figure.csv == expected and figure.file_name == "some-chart"
    (stored,) = unpack(json.loads(json.dumps(pack([Section("Charts", [figure])]))))
    assert stored.csv == expected


def test_brackets_in_cells_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(DataTable(["name"], [["[bold]x[/bold]"]], caption="[red]"))
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out and "[red]" in out


# --- many methods -------------------------------------------------------------------------


def test_a_metric_that_no_round_has_gets_no_chart(comparison: Path) -> None:
    """Runs from before macro-F1 was measured, over several seeds."""
    loaded = load_comparison(comparison)
    assert len(loaded.seeds) > 1
    assert by_round(loaded, lambda record: None, "Macro-F1 by round", "", {}) == []
    assert len(by_round(loaded, lambda record: 1.0, "One by round", "", {})) == 1


def test_three_methods_are_in_order_of_accuracy_with_personal_ones_last(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "three", [0, 1, 2], ["lora", "fedsa-lora", "copra"])
    summary = summarize(load_comparison(folder))
    assert ordered(summary) == ["copra", "lora", "fedsa-lora"]
    shown = results_table(summary)
    first, second, last, *references = shown.rows
    assert [row[:2] for row in references] == [["majority class", "30.0"], ["before round 1", "10.0"]]
    assert shown.header == ["method", "test accuracy, %", "minus lora, points", "MB", "seconds"]
    assert first[0] == "copra" and first[2] == "+3.0 [+0.5, +5.5]"
    assert second[0] == "lora" and second[2] == ""
    assert last[:3] == ["fedsa-lora", "none", "–"]
    sentences = verdict(summary).text
    assert sentences.startswith("copra has the highest test accuracy of 3 methods, 43.7 %. Significantly above lora")
    assert sentences.endswith("Not compared, because there is no global model to test: fedsa-lora.")


def test_a_personal_method_alone_and_against_one_other(tmp_path: Path) -> None:
    two = write_comparison(tmp_path / "two", [0], ["lora", "fedsa-lora"])
    assert "can only be compared on the clients' own data" in verdict(summarize(load_comparison(two))).text
    one = load_comparison(two / "fedsa-lora-seed0")
    assert verdict(summarize(one)).text.startswith("With fedsa-lora each client keeps its own model")


def test_a_verdict_on_personal_methods_awaits_no_test_accuracy(tmp_path: Path) -> None:
    folder, names = write_comparison(tmp_path / "three", [0], ["fedsa-lora"]), ["fedsa-lora", "short", "long"]
    for name in names[1:]:
        shutil.copytree(folder / "fedsa-lora-seed0", folder / f"{name}-seed0")
    (folder / "comparison.toml").write_text(f"methods = {json.dumps(names)}\nseeds = [0]\n")
    text = verdict(summarize(load_comparison(folder))).text
    assert text == "Not compared, because there is no global model to test: fedsa-lora, short and long."
    (folder / "long-seed0" / "summary.json").unlink()
    assert verdict(summarize(load_comparison(folder))).text.startswith("No method has a test accuracy yet; ")


def test_a_method_with_fewer_finished_seeds_is_marked(many: Path) -> None:
    shutil.rmtree(many / "flora-seed1")
    shutil.rmtree(many / "hetlora-seed0")
    shutil.rmtree(many / "hetlora-seed1")
    summary = summarize(load_comparison(many))
    cells = results_table(summary).rows
    assert "flora (1 of 2 seeds)" in [row[0] for row in cells]
    assert [row[:3] for row in cells[-4:-2]] == [
        ["hetlora (0 of 2 seeds)", "–", "–"],
        ["fedsa-lora", "none", "–"],
    ]


def test_a_single_run_has_the_method_name_of_compare(tmp_path: Path) -> None:
    for method in ("lora", "copra", "flora", "flora+copra"):
        write_run(tmp_path / method, method, 0, num_rounds=1)
        assert method_name(load_run(tmp_path / method).config) == method


def test_up_to_45_methods_look_different() -> None:
    assert styles(["lora", "copra"]) == {"lora": STYLES[0], "copra": STYLES[1]}
    methods = [f"{rule}{copra}" for rule in range(23) for copra in ("", "+copra")]
    by_method = styles(methods)
    assert len(set(by_method.values())) == len(methods)
    plain, with_copra = by_method["9"], by_method["9+copra"]
    assert plain.color == with_copra.color and plain.dash != with_copra.dash


def test_exact_rules_are_drawn_at_the_lowest_tick(many: Path) -> None:
    """A logarithmic axis has no 0: errors that are mere rounding are drawn at the lowest tick, called "exact"."""
    figures = figures_by_title(load_comparison(many))
    chart = figures["Aggregation error by round"].chart
    assert chart.layout.yaxis.type == "log" and chart.layout.yaxis.ticktext[0] == "exact"
    lines = {trace.name: trace for trace in chart.data}
    assert set(lines["flora"].y) == {chart.layout.yaxis.tickvals[0]}
    assert list(lines["flora"].customdata) == pytest.approx([4e-6, 8e-6, 12e-6])
    assert list(lines["lora"].y) == pytest.approx([20, 40, 60])
    assert "fedsa-lora" not in lines
    heatmap = figures["Aggregation error by layer"].chart.data[0]
    assert list(heatmap.x[:3]) == ["0.query", "0.value", "1.query"]


def test_pareto_optimal_methods_are_labeled(tmp_path: Path) -> None:
    """LoRA costs twice as much as FFA-LoRA; FLoRA costs more, so it is labeled if it is more accurate."""
    folder = write_comparison(tmp_path / "four", [0], ["lora", "ffa-lora", "flora", "fedsa-lora"])
    figure = figures_by_title(load_comparison(folder))["Accuracy for bytes"]
    labeled = {trace.name for trace in figure.chart.data if trace.text and trace.text[0]}
    accuracies = {method: final_accuracies(method)[0] for method in ("ffa-lora", "lora", "flora")}
    highest, expected = 0.0, set()
    for method, accuracy in accuracies.items():  # from cheap to expensive
        if accuracy > highest:
            highest, expected = accuracy, expected | {method}
    assert labeled == expected and "ffa-lora" in labeled
    assert "they have no global model to test: fedsa-lora" in figure.caption


@pytest.mark.parametrize("seeds", [[0, 1], [0, 1, 2]])
def test_what_a_user_decides_by_fits_80_columns(
    tmp_path: Path, seeds: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each method is one line with all columns; every column of the page is there on request."""
    folder = write_comparison(tmp_path / "many", seeds, many_methods())
    summary = summarize(load_comparison(folder))
    Console(width=80).print(results(summary))
    lines = capsys.readouterr().out.splitlines()
    shown = results_table(summary)
    assert shown.header == ["method", "test accuracy, %", "minus lora, points", "MB", "seconds"]
    for row in shown.rows:
        assert any(line.split() == " ".join(row).split() for line in lines), row
    assert any(" [" in cell for row in shown.rows for cell in row) == (len(seeds) > 2)
    monkeypatch.setenv("COLUMNS", "80")
    whole = run_command("report", folder, "--all-columns").out
    headings = {word for heading in all_results(summary).header for word in heading.split()}
    assert headings <= set(whole.split()) and "…" not in whole


def test_without_a_significant_difference_no_method_is_ranked(tmp_path: Path) -> None:
    """Two seeds with equal results: no interval, no order by accuracy, no highest, in every form of the results."""
    folder = write_comparison(tmp_path / "two", [0, 1], ["lora", "copra", "flora"])
    for method in ("lora", "copra", "flora"):
        (folder / f"{method}-seed1/summary.json").write_text((folder / f"{method}-seed0/summary.json").read_text())
    comparison = load_comparison(folder)
    assert ordered(summarize(comparison)) == ["lora", "copra", "flora"]
    printed = run_command("report", folder).out
    text = "Too few seeds to tell whether methods differ from lora: 2 paired seeds; run 3 or more."
    page, stored = (folder / "report.html").read_text(), json.loads((folder / "summary.json").read_text())
    assert comparison.verdict.text == stored["verdict"]["text"] == text
    assert text in " ".join(printed.split()) and text in page and text in comparison._repr_html_()
    assert not any(word in f"{printed}{page}" for word in ("highest test", "in brackets: 95 %"))
    of_methods = [*stored["methods"].values(), *stored["differences"].values()]
    assert {metric["interval"] for one in of_methods for metric in one.values() if isinstance(metric, dict)} == {None}


def test_the_highest_is_named_only_if_it_differs_from_the_baseline(tmp_path: Path) -> None:
    """flora is below lora in each seed; copra is above it by as much as it varies."""
    folder = write_comparison(tmp_path / "three", [0, 1, 2], ["lora", "copra", "flora"])
    for method, accuracies in {"lora": (0.5, 0.5, 0.5), "copra": (0.5, 0.6, 0.5), "flora": (0.4, 0.41, 0.4)}.items():
        for seed, accuracy in enumerate(accuracies):
            path = folder / f"{method}-seed{seed}/summary.json"
            summary = json.loads(path.read_text())
            path.write_text(json.dumps(summary | {"test": summary["test"] | {"accuracy": accuracy}}))
    found = load_comparison(folder).verdict
    assert (found.above, found.below, found.level) == ((), ("flora",), ("copra",))
    assert found.text.startswith("Significantly below lora") and "highest" not in found.text


def test_intervals_stay_in_the_possible_range() -> None:
    """By hand: mean 0.99, s = 0.01, half width 4.302653 * 0.01 / sqrt(3) = 0.024842, and no accuracy is above 1."""
    assert estimate([0.98, 0.99, 1.0], *possible_range("test_accuracy", False)).interval == pytest.approx((0.965158, 1))
    assert possible_range("test_accuracy/moods", True) == (-1, 1)
    assert possible_range("merge_gap_accuracy", False) == (-math.inf, math.inf)
    assert possible_range("bytes_up", False) == (0, math.inf) and possible_range("seconds", True)[0] == -math.inf


def test_a_method_that_is_no_better_than_the_most_frequent_class_is_warned_of(comparison: Path) -> None:
    """The most frequent of the classes has 600 of 2000 test examples."""
    assert no_better_than_majority(summarize(load_comparison(comparison))) == []
    for path in comparison.glob("copra-seed*/summary.json"):
        summary = RunSummary.from_json(path.read_text())
        path.write_text(
            summary.model_copy(update={"test": summary.test.model_copy(update={"accuracy": 0.25})}).to_json()
        )
    summary = summarize(load_comparison(comparison))
    warning = "No better than always predicting the most frequent class (30.0 %): copra (25.0 %)."
    assert no_better_than_majority(summary) == [warning]
    assert warning in render(load_comparison(comparison), summary)
