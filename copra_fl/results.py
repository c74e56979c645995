"""What runs left behind, read back and summarised: one number a seed, then mean and interval.

A run is one method with one seed. Methods are compared **paired by seed**: runs with the
same seed share partitions, initial adapters and data order, so the difference of a pair
has less noise than either run. With n seeds, mean m and standard deviation s (n - 1), the
95 % interval is Student's: m ± t(0.975, n - 1) s / sqrt(n). One seed has no interval.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from copra_fl.config import Config, read_toml

CONFIDENCE = 0.95
JSON_WIDTH = 120


class ResultsError(ValueError):
    """A folder that holds no readable run or comparison. The message names the file and what is wrong."""


class Estimate(TypedDict):
    """A number over seeds. `mean` is None where a seed has no finite value, `interval` also for one seed."""

    mean: float | None
    interval: tuple[float, float] | None
    values: list[float | None]


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
        return f"seed{'s' if len(self.seeds) > 1 else ''} {join(self.seeds)}"

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


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and 95 % t-interval of one value a seed.

    >>> [round(end, 3) for end in estimate([1.0, 2.0, 3.0])["interval"]]  # 2 ± 4.3027 * 1 / sqrt(3)
    [-0.484, 4.484]
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite or len(finite) < len(values):  # the mean of the seeds that did not diverge would flatter
        return {"mean": None, "interval": None, "values": [value if value in finite else None for value in values]}
    mean = fmean(finite)
    if len(finite) == 1:
        return {"mean": mean, "interval": None, "values": list(values)}
    half = float(stdtrit(len(finite) - 1, (1 + CONFIDENCE) / 2)) * stdev(finite) / math.sqrt(len(finite))
    return {"mean": mean, "interval": (mean - half, mean + half), "values": list(values)}


def metrics(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a finished run that are compared: accuracies in [0, 1], losses in nats, bytes, seconds.

    Client accuracy is that on the clients' own validation data, weighted by examples: of the global model, or of each
    client's own where there is none. Barriers and midpoint gap are means over the run's pairs of clients. A number
    that the run does not have, or was not asked for, is None. With several data sets test numbers are means over them;
    each one's own are there too, under ``test_accuracy/NAME`` and ``test_loss/NAME``.
    """
    test, validation, gap, unseen = (summary.get(part) or {} for part in ("test", "validation", "merge_gap", "unseen"))
    paths, clients = summary["paths"], summary["clients"]
    examples = sum(client["examples"] for client in clients)
    right = sum(client["examples"] * client["accuracy"] for client in clients)
    return (
        {
            "test_accuracy": test.get("accuracy"),
            "test_loss": test.get("loss"),
            "test_perplexity": test.get("perplexity"),
            "unseen_accuracy": unseen.get("accuracy"),
            "unseen_loss": unseen.get("loss"),
            "unseen_perplexity": unseen.get("perplexity"),
            "validation_accuracy": validation.get("accuracy"),
            "validation_loss": validation.get("loss"),
            "client_accuracy": right / examples if examples else None,
            "aggregation_error": summary.get("aggregation_error"),
            "merge_gap_accuracy": gap.get("accuracy"),
            "merge_gap_loss": gap.get("loss"),
            "bytes_up": summary["bytes_up"],
            "bytes_down": summary["bytes_down"],
            "bytes": summary["bytes_up"] + summary["bytes_down"],
            "seconds": summary["seconds"],
        }
        | {
            name: fmean(path[name] for path in paths) if paths else None
            for name in ("barrier_entezari", "barrier_frankle", "midpoint_gap")
        }
        | {
            f"test_{metric}/{name}": own[metric]
            for name, own in test.get("datasets", {}).items()
            for metric in ("accuracy", "loss")
        }
    )


def summarise(comparison: Comparison) -> dict[str, Any]:
    """What ``summary.json`` of a comparison holds; safe for JSON (no NaN, no infinity).

    ``methods``: for each method ``seeds`` (those finished) and an `Estimate` for each of `metrics`.
    ``differences``: the same for each method minus ``baseline``, over the seeds that both have finished.
    ``personal``: the methods without a global model, each client of which keeps its own.
    ``settings``: ``common`` to all methods, and ``differing``: key -> method -> value.
    ``unfinished``: method, seed and finished rounds of every run that was asked for and has no summary.
    """
    by_method = {
        method: {seed: metrics(end) for seed, end in comparison.finished(method)} for method in comparison.methods
    }
    baseline, *others = by_method
    common, differing = partition_settings(
        {method: runs[0].config.to_flat() for method, runs in comparison.methods.items() if runs}
    )
    common.pop("seed", None)
    return {
        "baseline": baseline,
        "seeds": comparison.seeds,
        "methods": {method: _estimates(by_seed) for method, by_seed in by_method.items()},
        "differences": {
            method: _estimates(_paired_differences(by_method[method], by_method[baseline])) for method in others
        },
        "personal": [
            method for method in by_method if any(end.get("personal") for _, end in comparison.finished(method))
        ],
        "settings": {"common": common, "differing": differing},
        "unfinished": [
            {"method": method, "seed": seed, "rounds": comparison.rounds_done(method, seed)}
            for method, by_seed in by_method.items()
            for seed in comparison.seeds
            if seed not in by_seed
        ],
    }


def _paired_differences(
    ours: dict[int, dict[str, float | None]], theirs: dict[int, dict[str, float | None]]
) -> dict[int, dict[str, float | None]]:
    return {
        seed: {
            name: None if value is None or (other := theirs[seed].get(name)) is None else value - other
            for name, value in ours[seed].items()
        }
        for seed in ours
        if seed in theirs
    }


def _estimates(by_seed: dict[int, dict[str, float | None]]) -> dict[str, Any]:
    names = next(iter(by_seed.values()), {})
    return {"seeds": list(by_seed)} | {name: estimate([run[name] for run in by_seed.values()]) for name in names}


def partition_settings(
    settings: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(key -> value where all of `settings` agree, key -> owner -> value where they do not)."""
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    values = {key: {owner: flat.get(key) for owner, flat in settings.items()} for key in keys}
    first = {key: next(iter(by_owner.values())) for key, by_owner in values.items()}
    common = {key: first[key] for key in keys if all(value == first[key] for value in values[key].values())}
    return common, {key: values[key] for key in keys if key not in common}


def activity(runs: Sequence[Run]) -> dict[int, npt.NDArray[np.float64]]:
    """Round -> (L,) share of steps in which each of L gate groups was on, averaged over clients and runs."""
    shares: dict[int, list[npt.NDArray[np.float64]]] = {}
    for run in runs:
        for row in run.journal:
            shares.setdefault(row["round"], []).extend(
                np.asarray(client["active_steps"]) / client["steps"] for client in row["clients"]
            )
    return {number: np.mean(clients, axis=0) for number, clients in sorted(shares.items())}


def join(items: Iterable[object]) -> str:
    """``1, 2 and 3``."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON with `write_text`. Raises ValueError for NaN and infinities."""
    write_text(path, _json_text(value) + "\n")


def _json_text(value: object, indent: str = "") -> str:
    """JSON in which an object or array stands on one line where it fits: a file of results reads as a table."""
    line = json.dumps(value, allow_nan=False)
    if len(indent) + len(line) <= JSON_WIDTH or not isinstance(value, Mapping | list | tuple):
        return line
    inner = indent + " "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(key))}: {_json_text(item, inner)}" for key, item in value.items()]
    else:
        items = [_json_text(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"


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
