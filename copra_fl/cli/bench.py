"""`copra-fl bench`: how fast our engine is, measured against Flower's and PEFT's own ways in one run."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import table as rich_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from copra_fl import provenance
from copra_fl.config import ConfigError


class SizeName(StrEnum):
    OVERHEAD = "overhead"
    SMALL = "small"
    COMPUTE = "compute"
    SMOKE = "smoke"


#: of `bench.contest.CONTESTANTS`, which is slow to import
LETTERS = "abcdefg"
DEFAULT_SIZES = [SizeName.OVERHEAD, SizeName.SMALL, SizeName.COMPUTE]

SizeOption = Annotated[
    list[SizeName] | None, typer.Option("--size", help="May be given several times. Default: all but smoke.")
]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each contestant.")]
EngineOnlyOption = Annotated[
    bool, typer.Option("--engine-only", help="Without Flower and Ray, which need not be installed.")
]
RandomBaseOption = Annotated[
    bool, typer.Option("--random-base", help="Random weights of MiniLM's shape, where MiniLM cannot be had.")
]
ContestantsOption = Annotated[
    str, typer.Option("--contestants", help="Their letters, for example bce; the tables say who they are.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="NAME of NAME.json and NAME.md. Default: dated, experiments/results/.")
]


def bench(
    size: SizeOption = None,
    repeats: RepeatsOption = 5,
    contestants: ContestantsOption = LETTERS,
    engine_only: EngineOnlyOption = False,
    random_base: RandomBaseOption = False,
    output: OutputOption = None,
) -> None:
    """Time our engine and its rivals on equal work; ends in tables and a verdict on each target.

    No time counts unless all contestants end with the adapters that plain PEFT trains. Wants an idle machine.
    """
    if strangers := set(contestants) - set(LETTERS):
        raise ConfigError(f"--contestants {contestants!r}: {', '.join(sorted(strangers))} is not one of {LETTERS}")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all contestants alike, see copra_fl/process.py
    warnings.simplefilter("ignore", FutureWarning)  # Transformers of its own attributes, and it tears the progress bar
    from copra_fl.bench import findings

    console = Console(stderr=True)
    stem = (output or _default_output()).absolute()
    stem.parent.mkdir(parents=True, exist_ok=True)
    facts: findings.Facts = {
        "command": shlex.join(["copra-fl", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "repeats": repeats,
        "sizes": {},
    }
    for name in size or DEFAULT_SIZES:
        facts["sizes"][str(name)] = _measure(str(name), repeats, contestants, engine_only, random_base, console)
        tables = findings.tables(facts)  # written after each size: the next one can take an hour
        stem.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(_markdown(facts, tables), encoding="utf-8")
    for table in tables:
        columns = [rich_table.Column(column, overflow="fold") for column in table.columns]
        shown = rich_table.Table(*columns, title=table.title, caption=table.note)
        for row in table.rows:
            shown.add_row(*row)
        Console().print(shown)
    console.print(f"results: {stem}.json, {stem}.md", soft_wrap=True)


def _measure(
    name: str, repeats: int, letters: str, engine_only: bool, random_base: bool, console: Console
) -> dict[str, Any]:
    """All facts of one size."""
    import torch

    from copra_fl.bench import contest, findings, simulations, sizes, workers

    size, gpu = sizes.SIZES[name], torch.cuda.is_available()
    contestants = [
        each for each in contest.CONTESTANTS if each.letter in letters and not (engine_only and each.on_flower)
    ]
    workload = sizes.prepare(size, random_base, as_file=not engine_only)
    shares = contest.divisions(os.cpu_count() or 1, size.clients, gpu)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=contest.num_runs(contestants, shares, repeats, size))

        def show(what: str) -> None:
            progress.update(task, description=f"{name}: {what}", advance=1)
            if not console.is_terminal:
                console.print(f"{name}: {what}", highlight=False, soft_wrap=True)

        results = contest.race(workload, contestants, shares, repeats, show)
        facts = findings.size_facts(workload, results)
        by_letter = {result.contestant.letter: result for result in results}
        if size.scaling and "g" in by_letter:
            runs = contest.scale(workload, by_letter["g"], repeats, show)
            adapter = workers.start_adapter(by_letter["g"].config)
            facts["scaling"] = findings.scaling_facts(runs, adapter)
            if "e" in by_letter:
                show("copra-fl simulate, first round")
                result = by_letter["e"]
                facts["simulate_first_round"] = [
                    simulations.first_round_of_simulate(result.config, result.share) for _ in range(repeats)
                ]
    return facts


def _default_output() -> Path:
    """Below experiments/results in a checkout, else here."""
    folder = Path("experiments/results") if Path("experiments").is_dir() else Path()
    return folder / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"


def _markdown(facts: dict[str, Any], tables: list[Any]) -> str:
    machine, versions = facts["machine"], facts["versions"]
    origin = [
        f"`{facts['command']}`, {facts['date']}, {facts['repeats']} repeats",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "# Benchmark\n\n" + "\\\n".join(origin) + "\n\n" + "\n".join(table.markdown() for table in tables)
