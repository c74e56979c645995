"""Results of a probe: a JSON file for programs, and a page in the style of the report for users."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_fl.files import atomic_write
from copra_fl.probes.open_run import OpenRun, Split
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.html import Section, pack, render
from copra_fl.reporting.results import without_folders
from copra_fl.wording import join_words


@dataclass(frozen=True)
class Findings:
    """Everything that a probe reports.

    Attributes:
        probe: name of the probe: ``connectivity``.
        title: of the page.
        setting: one line with runs, split, grid and seeds (see `setting_line`).
        verdict: the answer in one sentence.
        results: the main table, which is also printed.
        facts: all numbers, as plain data.
        sections: figures and further tables.
        warnings: what was not measured, and why.
    """

    probe: str
    title: str
    setting: str
    verdict: str
    results: DataTable
    facts: Mapping[str, Any]
    sections: Sequence[Section] = ()
    warnings: Sequence[str] = field(default_factory=list)


def write_findings(findings: Findings, directory: Path) -> Path:
    """Write ``probe-NAME.json`` and ``probe-NAME.html`` to `directory`; return the path of the page.

    ``probe-NAME.figures.json`` holds the figures for the report of the run (`reporting.report`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"probe-{findings.probe}"
    summary = {"probe": findings.probe, "setting": findings.setting, "verdict": findings.verdict}
    facts = _without_infinities(summary | {"warnings": list(findings.warnings)} | dict(findings.facts))
    atomic_write(stem.with_suffix(".json"), json.dumps(facts, indent=2, allow_nan=False) + "\n")
    figures = {"title": findings.title, "figures": pack(findings.sections)}
    atomic_write(stem.with_suffix(".figures.json"), json.dumps(figures) + "\n")
    html = render(
        findings.title, findings.setting, findings.verdict, findings.warnings, [findings.results], findings.sections
    )
    atomic_write(stem.with_suffix(".html"), html)
    return stem.with_suffix(".html")


def setting_line(runs: Sequence[OpenRun], split: Split, *details: str) -> str:
    """Return the setting of a probe in one line.

    ``lora-seed0 (seed 0) and copra-seed0 (seed 0) · minilm on health-tweets · 500 examples (server-validation)``
    """
    first = runs[0].config
    names = join_words(f"{run.name} (seed {run.config.federation.seed})" for run in runs)
    held_out = f"{len(runs[0].indices(split))} examples ({split})"
    return " · ".join(
        (names, f"{without_folders(first.model.model)} on {without_folders(first.data.dataset)}", held_out, *details)
    )


def setting_facts(runs: Sequence[OpenRun], split: Split) -> dict[str, Any]:
    """Return runs, split and number of examples as plain data."""
    return {
        "runs": [
            {"name": run.name, "directory": str(run.directory), "seed": run.config.federation.seed} for run in runs
        ],
        "split": split,
        "examples": len(runs[0].indices(split)),
    }


def _without_infinities(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {str(key): _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
