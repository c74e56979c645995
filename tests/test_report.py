"""From run folders to numbers and to a page: by hand, by what must hold, and in a browser."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from copra_fl.cli.report import report
from copra_fl.config import Config
from copra_fl.report import render, sections, write
from copra_fl.results import ResultsError, estimate, load_comparison, load_run, rows, summarise, verdict
from tests.browser import check_page, needs_chromium

LAYERS = [f"encoder.layer.{index}" for index in range(6)]
ACCURACY = {"lora": [0.40, 0.43, 0.39], "copra": [0.43, 0.45, 0.43]}


def write_run(folder: Path, method: str, seed: int, num_rounds: int = 3, finished: bool = True, **changes: Any) -> None:
    """A run folder as the server leaves it: 8 clients, 6 layers, numbers that a real run could have."""
    folder.mkdir(parents=True)
    config = Config().changed(local_training=method, seed=seed, num_rounds=num_rounds, num_clients=8, **changes)
    (folder / "config.toml").write_text(config.to_toml())
    provenance = {
        "versions": {"copra-fl": "0.1.0", "flwr": "1.42.0", "torch": "2.13.0+cpu"},
        "source_digest": "5f1e" * 16,
        "seeds": {"root": seed},
        "assets": {"minilm": "0a" * 32, "health-tweets": "1b" * 32},
        "machine": {"cpus": 2, "system": "Linux", "python": "3.11.7"},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    rng = np.random.default_rng([seed, len(method)])
    goal = ACCURACY[method][seed]
    steps = 150
    journal: list[dict[str, Any]] = []
    for number in range(1, num_rounds + 1):
        times = (number - 1 + (np.arange(steps) + 0.5) / steps) / num_rounds
        p = np.ones(steps) if method == "lora" else np.minimum(1, times / 0.75)
        accuracy = goal - 0.2 * 0.4**number
        journal.append(
            {
                "round": number,
                "seconds": 21.5 + rng.normal(),
                "bytes_up": 8 * 463_132,
                "bytes_down": 8 * 463_132,
                "train_loss": 2.6 - 0.3 * number,
                "clients": [
                    {
                        "client": client,
                        "examples": int(1500 / (client + 1.5 + seed)),
                        "steps": steps,
                        "loss": 2.6 - 0.3 * number + 0.1 * rng.normal(),
                        "seconds": 4.0,
                        "active_steps": [int((rng.random(steps) < p).sum()) for _ in LAYERS],
                    }
                    for client in range(8)
                    if (seed, number, client) != (1, 2, 5)
                ],
                "missing": [{"client": 5, "reason": "loss is not finite"}] if (seed, number) == (1, 2) else [],
                "validation": {"loss": 3.2 - 3 * accuracy, "accuracy": accuracy, "examples": 1000},
                "merge_gap": {"loss": -0.4 + 0.1 * number, "accuracy": 0.12 - 0.02 * number + 0.01 * rng.normal()},
                "layers": LAYERS,
            }
        )
    (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal))
    if not finished:
        return
    u = np.linspace(0, 1, 11)
    bump = 0.15 if method == "lora" else -0.1
    paths = []
    for pair in ([0, 1], [2, 5], [3, 7]):
        ends = 2.1 + 0.2 * rng.random(2)
        loss = (1 - u) * ends[0] + u * ends[1] + 4 * bump * u * (1 - u)
        accuracy = goal - 0.2 * (loss - loss.min())
        paths.append(
            {
                "clients": pair,
                "u": u.tolist(),
                "loss": loss.tolist(),
                "accuracy": accuracy.tolist(),
                "barrier_entezari": float(np.max(loss - (1 - u) * loss[0] - u * loss[-1])),
                "barrier_frankle": float(loss.max() - (loss[0] + loss[-1]) / 2),
                "midpoint_gap": float(accuracy[5] - (accuracy[0] + accuracy[-1]) / 2),
            }
        )
    summary = {
        "method": method,
        "seed": seed,
        "rounds": num_rounds,
        "test": {"loss": 3.2 - 3 * goal, "accuracy": goal, "examples": 2000},
        "validation": journal[-1]["validation"],
        "merge_gap": journal[-1]["merge_gap"],
        "bytes_up": sum(row["bytes_up"] for row in journal),
        "bytes_down": sum(row["bytes_down"] for row in journal),
        "seconds": sum(row["seconds"] for row in journal) + 10,
        "clients": [
            {"client": client, "accuracy": goal + 0.1 * rng.normal(), "loss": 2.0, "examples": 100 // (client + 1)}
            for client in range(8)
        ],
        "paths": paths,
        "skipped_clients": [6] if seed == 1 else [],
        "unassigned_examples": 12,
        "dropped_empty": 1,
        "dropped_duplicates": 7,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_comparison(folder: Path, seeds: list[int]) -> Path:
    """LoRA and CopRA with each of `seeds`."""
    folder.mkdir(parents=True)
    (folder / "comparison.toml").write_text(f'methods = ["lora", "copra"]\nseeds = {seeds}\n')
    for seed in seeds:
        write_run(folder / f"lora-seed{seed}", "lora", seed)
        write_run(folder / f"copra-seed{seed}", "copra", seed, learning_rate=5e-3)
    return folder


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "comparison", seeds=[0, 1, 2])


# --- numbers by hand ----------------------------------------------------------------------


def test_interval_of_three_seeds_by_hand() -> None:
    """mean 2, s = 1, t(0.975, 2) = 4.302653: the half width is 4.302653 / sqrt(3) = 2.484138."""
    found = estimate([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["interval"] == pytest.approx((-0.484138, 4.484138), abs=1e-6)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    assert estimate([0.4]) == {"mean": 0.4, "interval": None, "values": [0.4]}


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_diverged_seed_takes_the_mean_with_it(bad: float | None) -> None:
    """The mean of the other seeds would make a method that diverges look good."""
    assert estimate([1.0, bad, 3.0]) == {"mean": None, "interval": None, "values": [1.0, None, 3.0]}


def test_differences_are_paired_by_seed(comparison: Path) -> None:
    """Accuracies 0.43 - 0.40, 0.45 - 0.43, 0.43 - 0.39: mean 0.03, s = 0.01, half width 0.01 * 2.484138."""
    difference = summarise(load_comparison(comparison))["differences"]["copra"]["test_accuracy"]
    assert difference["values"] == pytest.approx([0.03, 0.02, 0.04])
    assert difference["mean"] == pytest.approx(0.03)
    assert difference["interval"] == pytest.approx((0.03 - 0.02484138, 0.03 + 0.02484138))


def test_barriers_are_means_over_pairs(comparison: Path) -> None:
    """A parabola of height 0.15 on a straight line: every pair's barrier is 0.15; below the line it is 0."""
    methods = summarise(load_comparison(comparison))["methods"]
    assert methods["lora"]["barrier_entezari"]["mean"] == pytest.approx(0.15)
    assert methods["copra"]["barrier_entezari"]["mean"] == pytest.approx(0)


# --- what a comparison says ---------------------------------------------------------------


def test_verdict_follows_the_interval(tmp_path: Path, comparison: Path) -> None:
    three = verdict(summarise(load_comparison(comparison)))
    assert three.startswith("copra ends 3.0 points above lora in test accuracy (95 % interval +0.5 to +5.5 points")
    two = verdict(summarise(load_comparison(write_comparison(tmp_path / "two", seeds=[0, 1]))))
    assert two.startswith("copra and lora cannot be told apart")
    one = verdict(summarise(load_comparison(write_comparison(tmp_path / "one", seeds=[0]))))
    assert "One seed tells nothing about the spread" in one


def test_missing_and_unfinished_runs_are_listed_and_not_averaged(comparison: Path) -> None:
    shutil.rmtree(comparison / "copra-seed0")
    (comparison / "lora-seed2" / "summary.json").unlink()
    summary = summarise(load_comparison(comparison))
    assert summary["unfinished"] == [
        {"method": "lora", "seed": 2, "rounds": 3},
        {"method": "copra", "seed": 0, "rounds": 0},
    ]
    assert summary["methods"]["lora"]["seeds"] == [0, 1]
    assert summary["methods"]["copra"]["seeds"] == [1, 2]
    assert summary["differences"]["copra"]["seeds"] == [1]


def test_settings_are_common_or_differ(comparison: Path) -> None:
    settings = summarise(load_comparison(comparison))["settings"]
    assert settings["differing"] == {
        "local-training": {"lora": "lora", "copra": "copra"},
        "learning-rate": {"lora": 2e-3, "copra": 5e-3},
    }
    assert settings["common"]["num-clients"] == 8
    assert "seed" not in settings["common"]


def test_rows_sign_only_the_differences(comparison: Path) -> None:
    lora, _, difference = rows(summarise(load_comparison(comparison)))
    assert lora[:2] == ["lora", "3"] and lora[2].startswith("40.7 [")
    assert difference[0] == "copra − lora" and difference[2] == "+3.0 [+0.5, +5.5]"


def test_half_a_journal_line_is_not_a_round(tmp_path: Path) -> None:
    """A run killed while it was writing."""
    write_run(tmp_path / "run", "copra", 0, finished=False)
    with (tmp_path / "run" / "journal.jsonl").open("a") as journal:
        journal.write('{"round": 4, "seco')
    assert [row["round"] for row in load_run(tmp_path / "run").journal] == [1, 2, 3]


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no run and no comparison"):
        load_comparison(tmp_path)
    write_run(tmp_path / "run", "copra", 0, num_rounds=1, finished=False)
    (tmp_path / "run" / "journal.jsonl").unlink()
    with pytest.raises(ResultsError, match="no finished round"):
        load_comparison(tmp_path / "run")


# --- the page -----------------------------------------------------------------------------


def num_figures(folder: Path) -> int:
    loaded = load_comparison(folder)
    return sum(len(section.figures) for section in sections(loaded, summarise(loaded)))


def test_every_figure_is_there(comparison: Path) -> None:
    loaded = load_comparison(comparison)
    figures = [figure for section in sections(loaded, summarise(loaded)) for figure in section.figures]
    assert [figure.title for figure in figures] == [
        "Accuracy by round",
        "Loss by round",
        "Merge gap in accuracy",
        "Merge gap in loss",
        "Loss on the line",
        "Accuracy on the line",
        "Probability of being on",
        "Activity by layer with copra",
        "Accuracy per client",
        "Examples per client",
        "Bytes sent",
        "Time",
    ]
    assert all(figure.caption.endswith(".") for figure in figures)
    page = render(loaded, summarise(loaded))
    assert all(figure.json in page for figure in figures)


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "copra", 0, dataset="</script><b>data")
    write(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "</script><b>data" not in page


def test_report_command_rewrites_page_and_summary(comparison: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(comparison)])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output
    written = json.loads((comparison / "summary.json").read_text())
    assert written == json.loads(json.dumps(summarise(load_comparison(comparison))))
    refused = CliRunner().invoke(app, [str(comparison.parent)])
    assert refused.exit_code == 2
    assert "no run and no comparison" in refused.output


def test_a_run_keeps_its_own_summary(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "copra", 0)
    before = (tmp_path / "run" / "summary.json").read_text()
    write(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_text() == before


@needs_chromium
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<script>fetch('http://example.org/data')</script>", "example.org"),
        ("<script>undefined_name()</script>", "undefined_name"),
        ("<p>nothing drawn</p>", "0 of 1 figures"),
    ],
)
def test_the_browser_check_complains(tmp_path: Path, body: str, complaint: str) -> None:
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title>bad</title>{body}")
    with pytest.raises(AssertionError, match=complaint):
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
