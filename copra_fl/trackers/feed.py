"""From run folders into trackers: what a tracker gets of a run, and when.

It always gets the run from its first round; one that has those rounds already (MLflow, after a resume) says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from copra_fl.reporting.results import load_run
from copra_fl.reporting.statistics import metrics


class Tracker(Protocol):
    """One run in one tracker; each tracker's file has `track(run)`, which opens it.

    Attributes:
        rounds: how many of the run's rounds are in it already.
    """

    rounds: int

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        """The figures of round `number`."""

    def close(self, results: Mapping[str, float] | None) -> None:
        """The end: with the results of a run that has finished, with None where it stands still."""


class Feed:
    """Follows the run in `directory` into the tracker `name`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self._tracker: Tracker | None = None
        self._finished = False

    def update(self) -> None:
        """Hand on what is new in the run's journal, and its results once it has them."""
        if self._finished or not (self.directory / "provenance.json").exists():
            return
        run = load_run(self.directory)
        if self._tracker is None:
            self._tracker = importlib.import_module(f"copra_fl.trackers.{self.name}").track(run)
        for row in run.journal[self._tracker.rounds :]:
            self._tracker.log(row["round"], scalars(row))
        self._tracker.rounds = len(run.journal)
        if run.summary is not None:
            self._finished = True
            self._tracker.close(_numbers(metrics(run.summary)))

    def close(self) -> None:
        if self._tracker is not None and not self._finished:
            self._tracker.close(None)


class Tracking:
    """The runs in `directories`, followed into the trackers `names`.

    One that fails gets nothing more, of which the user is told on `console`; the run and the others go on.
    """

    def __init__(self, names: Iterable[str], directories: Iterable[Path], console: Console) -> None:
        self._feeds = [Feed(name, directory) for directory in directories for name in names]
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
        except Exception as error:  # whatever it is, the run is worth more than its tracker
            self._feeds = [each for each in self._feeds if each.name != feed.name]
            note = f"note: {feed.name} failed and gets nothing more: {error}"
            self._console.print(note, highlight=False, markup=False, soft_wrap=True)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a journal line, as trackers name and group them; those that the round does not have are left out.

    Losses in nats, accuracies in [0, 1], bytes and seconds of the round, epsilon of all rounds so far.
    """
    validation, gap, error, privacy = (
        row.get(part) or {} for part in ("validation", "merge_gap", "aggregation_error", "privacy")
    )
    return _numbers(
        {
            "train/loss": row["train_loss"],
            "validation/loss": validation.get("loss"),
            "validation/accuracy": validation.get("accuracy"),
            "merge_gap/loss": gap.get("loss"),
            "merge_gap/accuracy": gap.get("accuracy"),
            "aggregation_error": error.get("total"),
            "privacy/epsilon": privacy.get("epsilon"),
            "clients/trained": len(row["clients"]),
            "clients/missing": len(row["missing"]),
            "bytes/up": row["bytes_up"],
            "bytes/down": row["bytes_down"],
            "seconds": row["seconds"],
        }
        | {
            f"validation/{name}/{metric}": own[metric]
            for name, own in validation.get("datasets", {}).items()
            for metric in ("loss", "accuracy")
        }
    )


def _numbers(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None}
