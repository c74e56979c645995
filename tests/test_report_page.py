"""Pages of reports: their figures and words, and what a browser finds in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from copra_fl.records import (
    ComparisonSummary,
    PrivacySpent,
    RoundRecord,
)
from copra_fl.reporting.report import render, sections, write
from copra_fl.reporting.results import load_comparison
from copra_fl.reporting.statistics import summarize
from tests.support.browser import check_page, needs_chromium
from tests.support.command_line import run_command
from tests.support.run_folders import figures_by_title, many_methods, num_figures, write_comparison, write_run


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "comparison", seeds=[0, 1, 2])


def test_the_report_has_every_figure(comparison: Path) -> None:
    loaded = load_comparison(comparison)
    figures = figures_by_title(loaded)
    assert list(figures) == [
        "Accuracy by round",
        "Loss by round",
        "Macro-F1 by round",
        "Confusion with lora",
        "Confusion with copra",
        "Aggregation error by round",
        "Aggregation error by layer",
        "Merge gap in accuracy",
        "Merge gap in loss",
        "Loss on the line",
        "Accuracy on the line",
        "Probability of being on",
        "Activity by layer with copra",
        "Accuracy per client",
        "Examples per client",
        "Accuracy against MB up",
        "Accuracy against MB up and down",
        "Accuracy against operations",
        "Bytes sent",
        "Time",
    ]
    assert all(figure.caption.endswith(".") for figure in figures.values())
    page = render(loaded, summarize(loaded))
    assert all(figure.json in page for figure in figures.values())


def test_the_report_says_which_epsilon_is_which(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lora", seed=0, num_rounds=1, finished=False)
    path = tmp_path / "run" / "journal.jsonl"
    record = RoundRecord.from_json(path.read_text())
    spent = {"epsilon": 1.5, "delta": 1e-5, "sampling_rate": 0.5, "noise_multiplier": 0.8, "clip": 0.1}
    for server_epsilon, cell in ((2.5, "2.500"), (None, "no limit")):
        privacy = PrivacySpent(**spent, server_epsilon=server_epsilon)
        path.write_text(record.model_copy(update={"privacy": privacy}).to_json() + "\n")
        loaded = load_comparison(tmp_path / "run")
        (section,) = [one for one in sections(loaded, summarize(loaded)) if one.title == "Differential privacy"]
        (table,) = section.tables
        assert table.header[2:4] == ["epsilon, who sees models", "epsilon, server"]
        assert table.rows == [["lora", "0", "1.500", cell, "1e-05", "0.8", "0.5"]]


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "copra", 0, dataset="</script><b>data")
    write(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "</script><b>data" not in page


def test_report_command_rewrites_page_and_summary(comparison: Path) -> None:
    assert "report.html" in run_command("report", comparison).out
    written = ComparisonSummary.from_json((comparison / "summary.json").read_text())
    assert written == summarize(load_comparison(comparison))
    assert "is not the folder of a run or comparison" in run_command("report", comparison.parent, code=2).message


def test_a_run_keeps_its_own_summary(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "copra", 0)
    before = (tmp_path / "run" / "summary.json").read_text()
    write(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_text() == before


@needs_chromium
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<script>fetch('http://example.org/data')</script>", "example.org"),
        ("<script>undefined_name()</script>", "undefined_name"),
        ("<p>nothing drawn</p>", "0 of 1 figures"),
    ],
)
def test_the_browser_check_finds_problems(tmp_path: Path, body: str, problem: str) -> None:
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title>bad</title>{body}")
    with pytest.raises(AssertionError, match=problem):
        check_page(tmp_path / "page.html", 1)


@needs_chromium
def test_page_opens_without_a_network(comparison: Path) -> None:
    write(comparison)
    check_page(comparison / "report.html", num_figures(comparison))


@needs_chromium
def test_page_of_one_unfinished_run_opens(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "copra", 0, finished=False)
    write(tmp_path / "run")
    check_page(tmp_path / "run" / "report.html", num_figures(tmp_path / "run"))


@needs_chromium
def test_page_of_many_methods_opens(tmp_path: Path) -> None:
    many = write_comparison(tmp_path / "many", [0, 1], many_methods())
    write(many)
    check_page(many / "report.html", num_figures(many))


@needs_chromium
def test_page_of_one_personal_run_opens(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "fedsa-lora", 0)
    write(tmp_path / "run")
    check_page(tmp_path / "run" / "report.html", num_figures(tmp_path / "run"))
