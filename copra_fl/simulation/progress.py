"""Progress of a running simulation: round, clients done, last accuracy, time left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from copra_fl import events
from copra_fl.simulation.superlink import RunFailed, SuperLink

#: share of local training in a round's part of the bar; the rest is evaluation
TRAINING_SHARE = 0.8
#: characters of the bar
BAR_WIDTH = 12
#: ANSI escape sequences of colors
COLORS = re.compile(r"\x1b\[[0-9;]*m")
#: Flower's status of a run whose server app has not ended
STARTING = ("pending", "starting", "running")
#: a line of a log that names an error: a level, or the class of an exception
ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|\w(Error|Exception)\b")


@dataclass
class ProgressState:
    """Progress of all runs, updated by the events of their processes (`copra_fl.events`).

    Attributes:
        stage: of the start of a run, until its first round.
        server: id of the process of the server app.
    """

    name: str = ""
    stage: str = "starting Flower and Ray"
    runs_done: int = 0
    rounds: int = 1
    round: int = 0
    clients: int = 1
    clients_done: float = 0.0
    recorded: int = 0
    accuracy: float | None = None
    phase: str = ""
    error: str | None = None
    server: int | None = None
    notes: set[str] = field(default_factory=set)

    def apply(self, event: dict[str, Any]) -> None:
        """Update the state with one event."""
        match event["event"]:
            case "server":
                self.server = event["pid"]
            case "stage":
                self.stage = event["text"]
            case "run":
                self.name, self.rounds = Path(event["directory"]).name, event["rounds"]
                self.round = self.recorded = 0
                self.clients_done = 0.0
                self.accuracy = None
            case "round":
                self.round, self.clients, self.clients_done = event["round"], event["clients"], 0
                self.recorded, self.phase = event["round"] - 1, "training"
            case "trained":
                self.clients_done += event["clients"]
            case "replied":  # the only event about workers on other machines
                self.clients_done = max(self.clients_done, event["clients"])
            case "evaluating":
                self.phase = "evaluating"
            case "recorded":
                self.recorded, self.phase = event["round"], "done"
                if event["accuracy"] is not None:
                    self.accuracy = event["accuracy"]
            case "testing":
                self.phase = "testing"
            case "finished":
                self.runs_done, self.accuracy = self.runs_done + 1, event["accuracy"]
            case "failed":
                self.error = self.error or event["error"]

    @property
    def done(self) -> float:
        """Number of finished runs, plus the finished share of the current one."""
        in_round = TRAINING_SHARE * self.clients_done / self.clients if self.round > self.recorded else 0.0
        return self.runs_done + min(1.0, (self.recorded + in_round) / self.rounds)

    def __str__(self) -> str:
        if not self.round:
            return f"{self.name}  {self.stage}".lstrip()
        text = f"{self.name}  round {self.round}/{self.rounds}  {self.phase}"
        if self.phase == "training":
            text += f" {self.clients_done:.0f}/{self.clients} clients"
        return text + (f"  accuracy {self.accuracy:.3f}" if self.accuracy is not None else "")


class EventReader:
    """Reads the event file `path` piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Return the complete events that were appended since the last call."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._position)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._position += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]


def watch_tracked(
    link: SuperLink,
    process: subprocess.Popen[bytes],
    directories: Sequence[Path],
    console: Console,
    track: Sequence[str],
    on_progress: Callable[[], None],
) -> None:
    """Show the progress of the runs in `directories` as `watch` does, and send their metrics to `track`'s trackers."""
    from copra_fl.trackers.feed import Tracking  # slow to import

    with closing(Tracking(track, directories, console)) as tracking:

        def update() -> None:
            tracking.update()
            on_progress()

        watch(link, process, len(directories), console, update)


def watch(
    link: SuperLink,
    process: subprocess.Popen[bytes],
    num_runs: int,
    console: Console,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Show progress until the server app has finished `num_runs` runs.

    `process` is the streaming ``flwr run``, as `is_running` has it. `on_progress` is called after each round and each
    run. Raises RunFailed with the reason if a run fails, if the process of the server app is killed, or if Flower ends
    before the runs are finished.
    """
    state, reader = ProgressState(), EventReader(Path(link.environment[events.VARIABLE]))
    oom_kills_before = oom_kills()
    whole = Column(no_wrap=True, min_width=7)  # in a narrow terminal the description wraps, and no time is cut
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        BarColumn(BAR_WIDTH),
        TimeElapsedColumn(table_column=whole),
        TextColumn("left", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=whole),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what callbacks print must not go to the console's standard error
        disable=console.quiet,
    ) as bar:
        task = bar.add_task(str(state), total=num_runs)
        running = True
        while running and not state.error and state.runs_done < num_runs:
            running = is_running(link, process, state.server)
            for event in reader.read_new():
                state.apply(event)
                if event["event"] == "note" and event["text"] not in state.notes:  # runs of a comparison repeat notes
                    state.notes.add(event["text"])
                    console.print(f"note: {event['text']}", soft_wrap=True)
                if event["event"] == "recorded":
                    console.print(str(state), soft_wrap=True)
                if event["event"] in ("recorded", "finished"):
                    on_progress()
            bar.update(task, description=str(state), completed=state.done)
            time.sleep(0.1 if running else 0)
    if state.error:
        raise RunFailed(f"{state.error.strip()}\nFlower's log: {link.log}")
    if state.runs_done < num_runs:
        done = f"{state.runs_done} of {num_runs} runs finished"
        if state.server and is_gone(state.server):  # an error of the server app would have been an event
            raise RunFailed(
                f"the process of the server app was killed, with {done}, {cause_of_kill(oom_kills_before)}. --resume "
                f"continues after the last round\nFlower's log: {link.log}"
            )
        raise RunFailed(
            f"Flower ended with {done} (status: {link.status()}): {last_error(link.log, link.superlink_log)}\n"
            f"Flower's log: {link.log}"
        )


def is_running(link: SuperLink, process: subprocess.Popen[bytes], server: int | None) -> bool:
    """Return whether a run goes on: its server app, or until that has begun, what starts it.

    The end of `process`, ``flwr run --stream``, alone does not tell: where other programs need all cores, it loses its
    connection to the SuperLink, while the run goes on. Then Flower's status of the run counts.
    """
    if server:
        return not is_gone(server)
    if process.poll() is None:
        return True
    status = link.status()
    return status in STARTING or (status == "unknown" and link.guard.poll() is None)


def is_gone(pid: int) -> bool:
    """Return True if the process `pid` has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def cause_of_kill(oom_kills_before: int) -> str:
    """Return why a process was killed, as a phrase, from `oom_kills` before it started."""
    if oom_kills() > oom_kills_before:
        return "since memory ran out: the kernel has killed a process of this machine meanwhile"
    return "by a signal such as SIGKILL"


def oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Return the number of processes that the kernel has killed for want of memory since it started; 0 if unknown."""
    try:
        counters = dict(line.split() for line in vmstat.read_text(encoding="utf-8").splitlines())
    except OSError:  # not Linux
        return 0
    return int(counters.get("oom_kill", 0))


def last_error(*logs: Path) -> str:
    """Return the last line that names an error in the first of Flower's logs that has one, without colors.

    A line with an exit code counts only if no other line of that log names an error.
    """
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = [COLORS.sub("", line).strip() for line in text.splitlines()]
        errors = [line for line in lines if ERROR.search(line)]
        causes = [line for line in errors if "Exit Code:" not in line]
        if errors:
            return (causes or errors)[-1]
    return "its log names no error"
