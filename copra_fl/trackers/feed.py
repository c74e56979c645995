"""Read run folders and send their rounds and results to trackers.

A tracker gets the run from its first round, or after a resume from the round that it does not have yet (MLflow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console

from copra_fl.reporting.results import Run, load_run
from copra_fl.reporting.statistics import measured, metrics, round_metrics
from copra_fl.trackers import find_tracker


class Tracker(Protocol):
    """One run in one tracker; the module of each tracker has `track(run)`, which opens it.

    Attributes:
        rounds: number of the run's rounds that it already has.
    """

    rounds: int

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        """Store the scalars of round `number`."""

    def close(self, results: Mapping[str, float] | None) -> None:
        """Store the results of a finished run; None for a run that has stopped without results."""


class Feed:
    """Sends the run in `directory`, read by `load`, to the tracker `name`."""

    def __init__(self, name: str, directory: Path, load: Callable[[Path], Run]) -> None:
        self.name = name
        self.directory = directory
        self._load = load
        self._tracker: Tracker | None = None
        self._finished = False

    def update(self) -> None:
        """Send the new rounds of the run's journal, and its results once the run has finished."""
        if self._finished or not (self.directory / "provenance.json").exists():
            return
        run = self._load(self.directory)
        if self._tracker is None:
            self._tracker = find_tracker(self.name)(run)
        for record in run.journal[self._tracker.rounds :]:
            self._tracker.log(record.round, round_metrics(record))
        self._tracker.rounds = len(run.journal)
        if run.summary is not None:
            self._finished = True
            self._tracker.close(measured(metrics(run)))

    def close(self) -> None:
        if self._tracker is not None and not self._finished:
            self._tracker.close(None)


class Tracking:
    """Sends the runs in `directories` to the trackers `names`; what these write goes below the run's `directory`.

    A tracker that raises is dropped with a warning on `console`; the run and the other trackers continue.
    """

    def __init__(
        self,
        names: Iterable[str],
        directories: Iterable[Path],
        console: Console,
        load: Callable[[Path], Run] = load_run,
    ) -> None:
        self._feeds = [Feed(name, directory, load) for directory in directories for name in names]
        self._console = console

    def update(self) -> None:
        for feed in list(self._feeds):
            self._try(feed, feed.update)

    def close(self) -> None:
        for feed in list(self._feeds):
            self._try(feed, feed.close)

    def _try(self, feed: Feed, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # a tracker's bug must not stop a run
            self._feeds = [other for other in self._feeds if other.name != feed.name]
            warning = f"warning: {feed.name} failed and is no longer used: {error}"
            self._console.print(warning, soft_wrap=True)
