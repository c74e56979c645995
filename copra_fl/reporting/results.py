"""Load the folders of runs and comparisons.

A run is one method with one seed. A comparison is a folder with ``comparison.toml`` and a run for each method and seed.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from copra_fl.config import Config, csv_list, read_toml
from copra_fl.records import Provenance, Record, RecordError, RoundRecord, RunSummary, Verdict, read_lines
from copra_fl.wording import join_words

if TYPE_CHECKING:  # slow to import
    import pandas as pd
    import plotly.graph_objects as go

RecordType = TypeVar("RecordType", bound=Record)


class ResultsError(ValueError):
    """A folder without a readable run or comparison. The message names the file and the problem."""


@dataclass(frozen=True, repr=False)
class Run:
    """One run folder.

    Attributes:
        journal: its finished rounds.
        summary: None until the run has finished.
        provenance: None until the run has started.
    """

    directory: Path
    config: Config
    journal: list[RoundRecord]
    summary: RunSummary | None
    provenance: Provenance | None

    @property
    def seed(self) -> int:
        return self.config.federation.seed

    @property
    def comparison(self) -> str | None:
        """Name of the comparison that this run is part of."""
        parent = self.directory.parent
        return parent.name if (parent / "comparison.toml").exists() else None

    @property
    def history(self) -> pd.DataFrame:
        """The finished rounds as a frame, one row per round (`reporting.frames.history`)."""
        from copra_fl.reporting import frames

        return frames.history(self)

    @property
    def clients(self) -> pd.DataFrame:
        """Training and final results of each client as a frame, one row per client (`reporting.frames.clients`)."""
        from copra_fl.reporting import frames

        return frames.clients(self)

    @property
    def figures(self) -> dict[str, go.Figure]:
        """The charts of the report as plotly figures, by title. Raises ResultsError before the first round."""
        return self._alone().figures

    @property
    def adapter(self) -> Path:
        """The folder of the final adapter, for `copra_fl.load`. Raises ResultsError for a run without one."""
        path = self.directory / "adapter"
        if not path.exists():
            reason = "its rule leaves a part of each model with its client" if self.summary else "it has not finished"
            raise ResultsError(f"the run in {self.directory} has no final adapter: {reason}")
        return path

    def _alone(self) -> Comparison:
        """Return the comparison of this run alone."""
        if not self.journal:
            raise ResultsError(f"the run in {self.directory} has no finished round")
        return Comparison(self.directory, {method_name(self.config): [self]}, [self.seed])

    def __repr__(self) -> str:
        rounds = f"{len(self.journal)} of {self.config.federation.num_rounds} rounds"
        return f"<Run {method_name(self.config)}, seed {self.seed}, {rounds}, in {self.directory}>"

    def _repr_html_(self) -> str:
        return self._alone()._repr_html_() if self.journal else html.escape(repr(self))


@dataclass(frozen=True, repr=False)
class Comparison:
    """Runs by method; the first method is the one that the others are compared with.

    A run that was asked for and has not started is in `seeds` but not in `methods`.
    """

    directory: Path
    methods: dict[str, list[Run]]
    seeds: list[int]

    @property
    def runs(self) -> Iterator[tuple[str, Run]]:
        """Every run with its method's name."""
        return ((method, run) for method, runs in self.methods.items() for run in runs)

    @property
    def is_single_run(self) -> bool:
        """True for the folder of one run, False for a folder with a run for each method and seed."""
        return any(run.directory == self.directory for _, run in self.runs)

    @property
    def named_seeds(self) -> str:
        """``seed 0``, or ``seeds 0, 1 and 2``."""
        return f"seed{'s' if len(self.seeds) > 1 else ''} {join_words(self.seeds)}"

    @property
    def mean_over_seeds(self) -> str:
        """``mean over seeds 0 and 1``, or ``seed 0``."""
        return f"mean over {self.named_seeds}" if len(self.seeds) > 1 else self.named_seeds

    def finished(self, method: str) -> list[tuple[int, RunSummary]]:
        """Return (seed, summary) of each run of `method` that has finished."""
        return [(run.seed, run.summary) for run in self.methods[method] if run.summary is not None]

    def finished_runs(self, method: str) -> list[Run]:
        """Return the runs of `method` that have finished."""
        return [run for run in self.methods[method] if run.summary is not None]

    def rounds_done(self, method: str, seed: int) -> int:
        return next((len(run.journal) for run in self.methods[method] if run.seed == seed), 0)

    @property
    def results(self) -> pd.DataFrame:
        """The finished runs as a frame, one row per run: method, seed and `reporting.statistics.metrics`."""
        from copra_fl.reporting import frames

        return frames.results(self)

    @property
    def history(self) -> pd.DataFrame:
        """The rounds of all runs as a frame: method, seed, and the columns of `Run.history`."""
        from copra_fl.reporting import frames

        return frames.of_each_run({(method, run.seed): run.history for method, run in self.runs})

    @property
    def clients(self) -> pd.DataFrame:
        """The clients of all runs as a frame: method, seed, and the columns of `Run.clients`."""
        from copra_fl.reporting import frames

        return frames.of_each_run({(method, run.seed): run.clients for method, run in self.runs})

    @property
    def figures(self) -> dict[str, go.Figure]:
        """The charts of the report as plotly figures, by title."""
        from copra_fl.reporting import report

        return report.titled_figures(self)

    @property
    def verdict(self) -> Verdict:
        """Which methods differ significantly from the first one, as ``summary.json`` and the report have it."""
        from copra_fl.reporting import statistics, verdict

        return verdict.verdict(statistics.summarize(self))

    def __repr__(self) -> str:
        return f"<Comparison of {join_words(self.methods)}, {self.named_seeds}, in {self.directory}>"

    def _repr_html_(self) -> str:
        from copra_fl.reporting import report

        return report.results_html(self)


def load_run(directory: str | Path) -> Run:
    """Load the run in `directory`, finished or not.

    Raises ResultsError for a folder without a run and for a file that is damaged or of another version, ConfigError for
    a ``config.toml`` that is not valid.
    """
    directory = Path(directory)
    if not (directory / "config.toml").exists():
        problem = "it has no config.toml" if directory.exists() else "it does not exist"
        if (directory / "comparison.toml").exists():
            problem = "it is a comparison: name one of the runs in it, or open all with copra_fl.load_comparison"
        raise ResultsError(f"{directory} is not the folder of a run: {problem}")
    provenance = _read(Provenance, directory / "provenance.json")  # first: another version has other settings, too
    summary = _read(RunSummary, directory / "summary.json")
    journal = _read_journal(directory / "journal.jsonl")
    return Run(directory, Config.from_toml(directory / "config.toml"), journal, summary, provenance)


def load_comparison(directory: str | Path) -> Comparison:
    """Load the comparison in `directory`; the folder of a single run is a comparison of one method.

    Raises ResultsError if it is neither, if a file is damaged or of another version, or if no run has a finished round.
    """
    directory = Path(directory)
    if (directory / "comparison.toml").exists():
        plan = read_toml(directory / "comparison.toml")
        if not plan.get("methods") or not plan.get("seeds"):
            raise ResultsError(f"{directory / 'comparison.toml'} must have non-empty lists `methods` and `seeds`")
        folders = {method: [directory / f"{method}-seed{seed}" for seed in plan["seeds"]] for method in plan["methods"]}
        methods = {
            method: [load_run(folder) for folder in started if (folder / "config.toml").exists()]
            for method, started in folders.items()
        }
        comparison = Comparison(directory, methods, plan["seeds"])
    elif (directory / "config.toml").exists():
        run = load_run(directory)
        comparison = Comparison(directory, {method_name(run.config): [run]}, [run.seed])
    else:
        raise ResultsError(f"{directory} is not the folder of a run or comparison: no config.toml, no comparison.toml")
    if not any(run.journal for _, run in comparison.runs):
        raise ResultsError(f"{directory} has no finished round to report")
    return comparison


def method_name(config: Config) -> str:
    """Return the name that `compare` gives to the method of `config`: ``copra``, ``flora``, ``flora+copra``."""
    rule, training = config.aggregation.rule, config.copra.local_training
    if rule == "fedavg":
        return training
    return rule if training == "lora" else f"{rule}+{training}"


def without_folders(value: object) -> str:
    """Return the setting ``model`` or ``dataset`` without the folders of local paths."""
    return ", ".join(map(without_folder, csv_list(str(value))))


def without_folder(name: str) -> str:
    """Return the name of a model or data set; of a local path its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def _read_journal(path: Path) -> list[RoundRecord]:
    """Return the records of a journal; damaged lines are left out, and a resume of the run restores them."""
    if not path.exists():
        return []
    try:
        records, _ = read_lines(path)
    except RecordError as error:
        raise ResultsError(f"{path}: {error}") from None
    return records


def _read(record_type: type[RecordType], path: Path) -> RecordType | None:
    if not path.exists():
        return None
    try:
        return record_type.from_json(path.read_bytes())
    except RecordError as error:
        raise ResultsError(f"{path}: {error}") from None
