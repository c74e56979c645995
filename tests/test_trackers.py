"""Trackers, read back with their own readers: what they hold is what the journal of a real run says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from copra_fl.cli import app
from copra_fl.config import Config, ConfigError
from copra_fl.trackers import checked
from copra_fl.trackers.feed import Tracking
from tests.support.local_grid import run_federation

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tiny: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = run_federation(tiny, tmp_path_factory.mktemp("tracked") / "run")
    (directory / "config.toml").write_text(Config.from_flat(tiny).to_toml())
    return directory


@pytest.fixture
def stages(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of a run as it was after its first round; asked again, as it was at its end."""

    def grow() -> Iterator[Path]:
        directory = tmp_path / "run"
        directory.mkdir()
        for name in ("config.toml", "provenance.json"):
            shutil.copy(finished / name, directory / name)
        first, *rest = (finished / "journal.jsonl").read_text().splitlines(keepends=True)
        (directory / "journal.jsonl").write_text(first + rest[0][:9])  # half a line: the server is writing
        yield directory
        (directory / "journal.jsonl").write_text(first + "".join(rest))
        shutil.copy(finished / "summary.json", directory / "summary.json")
        yield directory

    return grow()


def follow(name: str, stages: Iterator[Path]) -> tuple[Rows, dict[str, Any]]:
    """Track a run as it goes, the command stopped after its first round and resumed: its journal and summary."""
    for directory in stages:
        with closing(Tracking([name], [directory], Console())) as tracking:
            tracking.update()
            tracking.update()  # nothing is new: nothing is written twice
    journal = (directory / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in journal], json.loads((directory / "summary.json").read_text())


def test_tensorboard_has_every_round_once(stages: Iterator[Path], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows, summary = follow("tensorboard", stages)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()

    def written(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(name)]

    for name, part in (("validation/accuracy", "validation"), ("merge_gap/accuracy", "merge_gap")):
        assert written(name) == [(row["round"], pytest.approx(row[part]["accuracy"])) for row in rows]
    assert written("train/loss") == [(row["round"], pytest.approx(row["train_loss"])) for row in rows]
    assert written("bytes/up") == [(row["round"], row["bytes_up"]) for row in rows]
    assert written("aggregation_error") == [
        (row["round"], pytest.approx(row["aggregation_error"]["total"])) for row in rows
    ]
    assert [value for _, value in written("results/test_accuracy")] == [pytest.approx(summary["test"]["accuracy"])]


def test_mlflow_goes_on_with_a_run_that_is_resumed(
    stages: Iterator[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    rows, summary = follow("mlflow", stages)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("copra-fl").experiment_id])
    history = client.get_metric_history(run.info.run_id, "validation/accuracy")
    assert [(each.step, each.value) for each in history] == [(r["round"], r["validation"]["accuracy"]) for r in rows]
    assert run.data.metrics["results/test_accuracy"] == summary["test"]["accuracy"]
    assert (run.info.status, run.info.run_name, run.data.params["rank"]) == ("FINISHED", "run", "2")


def test_wandb_leaves_a_folder_to_sync(stages: Iterator[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    follow("wandb", stages)
    number = json.loads((tmp_path / "run" / "provenance.json").read_text())["run"]
    written = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{number}.wandb"))
    assert written and all(path.stat().st_size for path in written)
    assert all(b"validation/accuracy" in path.read_bytes() for path in written)


def test_a_tracker_that_fails_leaves_the_run_alone(stages: Iterator[Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    directory = next(stages)
    (directory / "tensorboard").write_text("a file is in the way")
    follow("tensorboard", stages)
    assert "note: tensorboard failed and gets nothing more" in capsys.readouterr().out


def test_track_takes_a_finished_run(finished: Path) -> None:
    pytest.importorskip("tensorboard")
    result = CliRunner().invoke(app, ["track", str(finished), "--to", "tensorboard"])
    assert result.exit_code == 0, result.output
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))


def test_what_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'. Did you mean 'tensorboard'"):
        checked(["tensorbord"])
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'copra-fl\[wandb\]'"):
        checked(["wandb"])
