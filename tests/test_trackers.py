"""Trackers: their own readers find the journal and the results of a real run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from copra_fl.cli import app
from copra_fl.config import Config, ConfigError
from copra_fl.records import Provenance, RoundRecord, RunSummary
from copra_fl.reporting.results import load_run
from copra_fl.trackers import checked
from copra_fl.trackers.feed import Tracking
from tests.support.local_grid import run_federation


@pytest.fixture(scope="module")
def finished(tiny: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = run_federation(tiny, tmp_path_factory.mktemp("tracked") / "run")
    (directory / "config.toml").write_text(Config.from_flat(tiny).to_toml())
    return directory


@pytest.fixture
def stages(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a run folder twice: as it was after the run's first round, then as it was at the run's end."""

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


def follow(name: str, stages: Iterator[Path]) -> tuple[list[RoundRecord], RunSummary]:
    """Track a run in two processes, one that stops after its first round and one after a resume; return its records."""
    for directory in stages:
        with closing(Tracking([name], [directory], Console())) as tracking:
            tracking.update()
            tracking.update()  # nothing is new, so nothing is written twice
    run = load_run(directory)
    assert run.summary is not None and all(record.validation and record.merge_gap for record in run.journal)
    return run.journal, run.summary


def test_tensorboard_has_every_round_once(stages: Iterator[Path], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    journal, summary = follow("tensorboard", stages)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = {
        "validation/accuracy": [record.validation.accuracy for record in journal],
        "merge_gap/accuracy": [record.merge_gap.accuracy for record in journal],
        "aggregation_error": [record.aggregation_error.total for record in journal],
        "train/loss": [record.train_loss for record in journal],
        "bytes/up": [record.bytes_up for record in journal],
    }
    for name, values in expected.items():
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(number, pytest.approx(value)) for number, value in enumerate(values, start=1)], name
    (result,) = events.Scalars("results/test_accuracy")
    assert result.value == pytest.approx(summary.test.accuracy)


def test_mlflow_continues_the_run_after_a_resume(
    stages: Iterator[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    journal, summary = follow("mlflow", stages)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("copra-fl").experiment_id])
    history = client.get_metric_history(run.info.run_id, "validation/accuracy")
    expected = [(record.round, record.validation.accuracy) for record in journal]
    assert [(metric.step, metric.value) for metric in history] == expected
    assert run.data.metrics["results/test_accuracy"] == summary.test.accuracy
    assert (run.info.status, run.info.run_name, run.data.params["rank"]) == ("FINISHED", "run", "2")


def test_wandb_leaves_a_folder_to_sync(stages: Iterator[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    follow("wandb", stages)
    run_id = Provenance.from_json((tmp_path / "run" / "provenance.json").read_text()).run
    written = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert written and all(path.stat().st_size for path in written)
    assert all(b"validation/accuracy" in path.read_bytes() for path in written)


def test_a_tracker_that_fails_leaves_the_run_alone(stages: Iterator[Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    directory = next(stages)
    (directory / "tensorboard").write_text("a file is in the way")
    follow("tensorboard", stages)
    assert "warning: tensorboard failed and is no longer used" in capsys.readouterr().out


def test_track_takes_a_finished_run(finished: Path) -> None:
    pytest.importorskip("tensorboard")
    result = CliRunner().invoke(app, ["track", str(finished), "--to", "tensorboard"])
    assert result.exit_code == 0, result.output
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))


def test_an_unknown_or_missing_tracker_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'. Did you mean 'tensorboard'"):
        checked(["tensorbord"])
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"pip install '.+\[wandb\]'"):
        checked(["wandb"])
