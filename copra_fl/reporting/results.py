"""What runs left behind, read back and summarised: one number a seed, then mean and interval.

A run is one method with one seed. Methods are compared **paired by seed**: runs with the
same seed share partitions, initial adapters and data order, so the difference of a pair
has less noise than either run. With n seeds, mean m and standard deviation s (n - 1), the
95 % interval is Student's: m ± t(0.975, n - 1) s / sqrt(n). One seed has no interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copra_fl.config import Config, read_toml
from copra_fl.wording import join_words


class ResultsError(ValueError):
    """A folder that holds no readable run or comparison. The message names the file and what is wrong."""


@dataclass(frozen=True)
class Run:
    """One run folder. `summary` is None until the run has finished; `journal` has a dict a round."""

    directory: Path
    config: Config
    journal: list[dict[str, Any]]
    summary: dict[str, Any] | None
    provenance: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config.federation.seed

    @property
    def comparison(self) -> str | None:
        """Name of the comparison that this run is part of."""
        parent = self.directory.parent
        return parent.name if (parent / "comparison.toml").exists() else None


@dataclass(frozen=True)
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
        """Whether this is the folder of one run, and not one with a run a method and seed."""
        return any(run.directory == self.directory for _, run in self.runs)

    @property
    def named_seeds(self) -> str:
        """``seed 0``, or ``seeds 0, 1 and 2``."""
        return f"seed{'s' if len(self.seeds) > 1 else ''} {join_words(self.seeds)}"

    def finished(self, method: str) -> list[tuple[int, dict[str, Any]]]:
        """(seed, summary) of each run of `method` that has finished."""
        return [(run.seed, run.summary) for run in self.methods[method] if run.summary is not None]

    def rounds_done(self, method: str, seed: int) -> int:
        return next((len(run.journal) for run in self.methods[method] if run.seed == seed), 0)


def load_run(directory: Path) -> Run:
    """The run in `directory`, finished or not.

    Raises ResultsError where a file is damaged, ConfigError where there is no valid ``config.toml``.
    """
    summary = directory / "summary.json"
    provenance = directory / "provenance.json"
    return Run(
        directory=directory,
        config=Config.from_toml(directory / "config.toml"),
        journal=_read_journal(directory / "journal.jsonl"),
        summary=_parse_json(summary.read_text(encoding="utf-8"), summary) if summary.exists() else None,
        provenance=_parse_json(provenance.read_text(encoding="utf-8"), provenance) if provenance.exists() else {},
    )


def load_comparison(directory: Path) -> Comparison:
    """The comparison in `directory`; the folder of a single run is a comparison of one method.

    Raises ResultsError where it is neither, or no run in it has finished a round.
    """
    if (directory / "comparison.toml").exists():
        plan = read_toml(directory / "comparison.toml")
        if not plan.get("methods") or not plan.get("seeds"):
            raise ResultsError(f"{directory / 'comparison.toml'} does not name methods and seeds")
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
        raise ResultsError(f"{directory} is no run and no comparison: it has no config.toml and no comparison.toml")
    if not any(run.journal for _, run in comparison.runs):
        raise ResultsError(f"{directory} has no finished round to report")
    return comparison


def method_name(config: Config) -> str:
    """What a single run's method is called, as `compare` would call it: ``copra``, ``flora``, ``flora+copra``."""
    rule, training = config.aggregation.rule, config.copra.local_training
    if rule == "fedavg":
        return training
    return rule if training == "lora" else f"{rule}+{training}"


def _read_journal(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole_lines = text[: text.rfind("\n") + 1]  # a run killed while writing leaves half a line
    return [_parse_json(line, path) for line in whole_lines.splitlines()]


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ResultsError(f"{path} holds {parsed!r} where an object was expected")
    return parsed
