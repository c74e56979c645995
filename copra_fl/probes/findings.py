"""What a probe found: a JSON file for programs, and a page of the report's kind for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_fl.files import atomic_write
from copra_fl.probes.open_run import OpenRun, Split
from copra_fl.reporting.html import DataTable, Section, pack, render
from copra_fl.wording import join_words


@dataclass(frozen=True)
class Findings:
    """
    Attributes:
        probe: its name: ``connectivity``.
        title: of the page.
        setting: one line: runs, split, grid, seeds (see `setting`).
        verdict: the answer in a sentence.
        results: the table that is also printed.
        facts: all numbers, as plain data.
        sections: figures and further tables.
        warnings: what could not be measured, and why.
    """

    probe: str
    title: str
    setting: str
    verdict: str
    results: DataTable
    facts: Mapping[str, Any]
    sections: Sequence[Section] = ()
    warnings: Sequence[str] = field(default_factory=list)


def write(findings: Findings, directory: Path) -> Path:
    """Write ``probe-NAME.json`` and ``probe-NAME.html`` to `directory`; returns the page.

    ``probe-NAME.figures.json`` is for the report of the run (`reporting.report`), which shows the same figures.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"probe-{findings.probe}"
    told = {"probe": findings.probe, "setting": findings.setting, "verdict": findings.verdict}
    facts = _finite(told | {"warnings": list(findings.warnings)} | dict(findings.facts))
    atomic_write(stem.with_suffix(".json"), json.dumps(facts, indent=2, allow_nan=False) + "\n")
    figures = {"title": findings.title, "figures": pack(findings.sections)}
    atomic_write(stem.with_suffix(".figures.json"), json.dumps(figures) + "\n")
    html = render(
        findings.title, findings.setting, findings.verdict, findings.warnings, [findings.results], findings.sections
    )
    atomic_write(stem.with_suffix(".html"), html)
    return stem.with_suffix(".html")


def setting(runs: Sequence[OpenRun], split: Split, *more: str) -> str:
    """``lora-seed0 (seed 0) and copra-seed0 (seed 0) · minilm on health-tweets · 500 examples (server-validation)``."""
    first = runs[0].config
    named = join_words(f"{run.name} (seed {run.config.federation.seed})" for run in runs)
    held_out = f"{len(runs[0].indices(split))} examples ({split})"
    return " · ".join((named, f"{first.model.model} on {first.data.dataset}", held_out, *more))


def origin(runs: Sequence[OpenRun], split: Split) -> dict[str, Any]:
    """What `setting` says, as facts."""
    return {
        "runs": [
            {"name": run.name, "directory": str(run.directory), "seed": run.config.federation.seed} for run in runs
        ],
        "split": split,
        "examples": len(runs[0].indices(split)),
    }


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
