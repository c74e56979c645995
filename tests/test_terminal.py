"""Terminal output of a run: progress bars, notes, and names with brackets, which are not markup."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from copra_fl import events
from copra_fl.cli import probe
from copra_fl.config import Config
from copra_fl.console import plain_console
from copra_fl.probes.findings import Findings
from copra_fl.reporting.data_table import DataTable
from copra_fl.simulation import preflight
from copra_fl.simulation.comparison import expand_all
from copra_fl.simulation.progress import ProgressState, watch
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.superlink import RunFailed
from tests.support.command_line import run_command
from tests.support.run_folders import write_run
from tests.support.tiny import Settings


def test_a_narrow_terminal_cuts_no_time_and_keeps_finished_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    events.emit("run", directory="runs/trimmed-mean-product-seed10", rounds=12)
    for number in (1, 2):
        events.emit("round", round=number, clients=12)
        events.emit("recorded", round=number, accuracy=0.5)
    events.emit("round", round=3, clients=12)
    link: Any = SimpleNamespace(
        environment={events.VARIABLE: str(tmp_path / "events")},
        log=tmp_path / "log",
        superlink_log=tmp_path / "superlink.log",
        status=lambda: "failed",
    )
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80, color_system=None)
    with pytest.raises(RunFailed):
        watch(link, subprocess.Popen(["sleep", "0.5"]), 1, console)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "trimmed-mean-product-seed10  round 1/12  done  accuracy 0.500\n" in text
    assert "round 2/12  done" in text and re.search(r"0:00:00 +left +-:--:--", text) and "…" not in text


def test_a_line_says_what_the_first_round_waits_for() -> None:
    state = ProgressState()
    lines = [str(state)]
    for event in (
        {"event": "stage", "text": "starting the server app"},
        {"event": "run", "directory": "runs/lora-seed0", "rounds": 2},
        {"event": "stage", "text": "waiting for the workers"},
        {"event": "stage", "text": "loading the model"},
        {"event": "round", "round": 1, "clients": 4},
    ):
        state.apply(event)
        lines.append(str(state))
    assert lines == [
        "starting Flower and Ray",
        "starting the server app",
        "lora-seed0  starting the server app",
        "lora-seed0  waiting for the workers",
        "lora-seed0  loading the model",
        "lora-seed0  round 1/2  training 0/4 clients",
    ]


def test_the_accuracy_shown_is_that_of_the_last_evaluation() -> None:
    state = ProgressState()
    shown = []
    for number, accuracy in enumerate([0.5, 0.0, None], start=1):
        state.apply({"event": "recorded", "round": number, "accuracy": accuracy})
        shown.append(state.accuracy)
    assert shown == [0.5, 0.0, 0.0]


def test_clients_count_when_they_are_trained_or_have_replied() -> None:
    """Workers on this machine report each trained client; of those on other machines only replies are known."""
    state = ProgressState()
    state.apply({"event": "round", "round": 1, "clients": 6})
    done = []
    for event, clients in [("trained", 1.5), ("replied", 3), ("trained", 0.5), ("replied", 6)]:
        state.apply({"event": event, "clients": clients})
        done.append(state.clients_done)
    assert done == [1.5, 3, 3.5, 6]


def test_a_note_that_several_runs_repeat_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    for _ in range(2):
        events.emit("note", text="clients train one by one")
        events.emit("finished", accuracy=None)
    link: Any = SimpleNamespace(
        environment={events.VARIABLE: str(tmp_path / "events")}, status=lambda: "finished:completed"
    )
    watch(link, subprocess.Popen(["true"]), 2, Console())
    assert capsys.readouterr().out.count("note: clients train one by one") == 1


def test_brackets_in_names_are_printed_in_notes(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = pd.read_csv(str(tiny["dataset"]))
    names = ["[/b]", "[deleted]", "[/red]", "[bold]", "[/deleted]", "[red]"]  # `rich` would fail, or drop them
    rows.assign(owner=rows["owner"].map(lambda owner: names[int(owner[-1])])).to_csv("posts.csv", index=False)
    natural = {"partitioner": "natural", "client-column": "owner", "held-out-clients": 2, "num-clients": 0}
    config = Config.from_flat(tiny | natural | {"dataset": "posts.csv"})
    preflight.check([config], plain_console(stderr=True), WorkerRequest(1, 0, None))
    (held_out,) = re.findall("held-out clients: (.*)", capsys.readouterr().err)
    assert len(shown := held_out.split(", ")) == 2 and set(shown) < set(names)

    expand_all({"all": "all"}, Recipe(tiny | {"dataset": "[/b].csv,b.csv"}), plain_console(stderr=True))
    assert "is left out: dataset = '[/b].csv,b.csv' (several data sets)" in capsys.readouterr().err


def test_brackets_in_names_are_printed_during_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    events.emit("run", directory="runs/[bold]-seed0", rounds=2)
    events.emit("note", text="[/b] is skipped")
    events.emit("round", round=1, clients=2)
    events.emit("recorded", round=1, accuracy=0.5)
    events.emit("round", round=2, clients=2)
    events.emit("finished", accuracy=None)
    link: Any = SimpleNamespace(environment={events.VARIABLE: str(tmp_path / "events")}, status=lambda: "running")
    watch(link, subprocess.Popen(["true"]), 1, plain_console(force_terminal=True, width=120, color_system=None))
    out = capsys.readouterr().out
    assert "note: [/b] is skipped" in out and "[bold]-seed0  round 1/2  done  accuracy 0.500\n" in out
    assert "[bold]-seed0  round 2/2  training" in out, "the bar"


def test_brackets_in_names_are_printed_by_probes_and_in_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, warnings = DataTable(["run"], []), ["[/red] is left out"]
    probe.leave(Findings("merge", "title", "setting", "[/b] is best", table, {}, warnings=warnings), tmp_path / "[i]")
    with probe.progress_bar() as progress:
        progress("[/b]: coalitions", 1, 2)
    out = capsys.readouterr().out
    assert "[/b] is best" in out and "note: [/red] is left out" in out and "[i]/probe-merge.html" in out
    write_run(tmp_path / "[deleted]", "lora", seed=0)
    assert f"report: {tmp_path}/[deleted]/report.html" in run_command("report", tmp_path / "[deleted]").out
    assert "/[i]/d: 2 clients; next: copra-fl deploy up" in run_command("deploy", "init", tmp_path / "[i]" / "d").err
