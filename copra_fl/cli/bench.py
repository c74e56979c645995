"""`copra-fl bench`: time the stacked engine against plain Flower and PEFT on equal work."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import warnings
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from copra_fl import provenance, startup
from copra_fl.config import ConfigError
from copra_fl.console import plain_console
from copra_fl.simulation.run_folder import check_writable

if TYPE_CHECKING:  # slow to import
    from copra_fl.bench.sizes import Size
    from copra_fl.reporting.data_table import DataTable


class SizeName(StrEnum):
    OVERHEAD = "overhead"
    SMALL = "small"
    COMPUTE = "compute"
    SMOKE = "smoke"
    CLIENTS = "clients"
    GPU = "gpu"


#: of `bench.runner.COMPETITORS`, which is slow to import
LETTERS = "abcBCdefg"
DEFAULT_SIZES = [SizeName.OVERHEAD, SizeName.SMALL, SizeName.COMPUTE]
DEFAULT_REPEATS = 5
#: smallest number of clients of --populations
MIN_POPULATION = 10
#: --quick: our engine and one rival, each in both dtypes, none over Flower
QUICK_LETTERS = "cCfg"

SizeOption = Annotated[
    list[SizeName] | None,
    typer.Option(
        "--size",
        help="Size of the work. May be repeated. Default: overhead, small and compute. clients: a federation by phase, "
        "from 100 to 100,000 clients. gpu: many clients of a language model, needs neither Flower nor Ray.",
    ),
]
PopulationsOption = Annotated[
    str | None,
    typer.Option("--populations", help="With --size clients: numbers of clients. Default: 100,1000,10000,100000."),
]
RepeatsOption = Annotated[
    int | None, typer.Option("--repeats", min=1, help=f"Timed runs of each competitor. Default: {DEFAULT_REPEATS}.")
]
EngineOnlyOption = Annotated[
    bool, typer.Option("--engine-only", help="Leave out Flower and Ray, which need not be installed then.")
]
RandomBaseOption = Annotated[
    bool, typer.Option("--random-base", help="Use random weights with the shapes of MiniLM instead of MiniLM.")
]
CompetitorsOption = Annotated[
    str | None,
    typer.Option(
        "--competitors",
        help="Letters, for example bce. a: Flower with a new model for each message, b: with warm actors, c: a loop "
        "with PEFT, B and C: b and c in our dtype; d: copra-fl with one client per node, e: with cohorts, f: its "
        "engine alone in float32, g: in our dtype. Default: all.",
    ),
]
QuickOption = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="A few minutes on 2 idle cores: the stacked engine against a PEFT loop, without Flower, with few "
        "clients and one repeat. The output lists what is left out.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print medians as JSON on standard output, tables on standard error. Competitors are naive, tuned, loop, "
        "node, cohort, engine_float32, engine: (a) to (g). overhead and small are clients per second of LoRA, compute "
        "of lora and copra; null is what did not run.",
    ),
]
PageOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--page",
        metavar="NAME.json",
        help="Measure nothing; write the page of stored results. May be repeated to show several results on one page.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Path without suffix for the .json, .md and .html files. Default: a dated name in experiments/results/.",
    ),
]


def bench(
    size: SizeOption = None,
    populations: PopulationsOption = None,
    repeats: RepeatsOption = None,
    competitors: CompetitorsOption = None,
    engine_only: EngineOnlyOption = False,
    random_base: RandomBaseOption = False,
    quick: QuickOption = False,
    as_json: JsonOption = False,
    page: PageOption = None,
    output: OutputOption = None,
) -> None:
    """Time the stacked engine and its competitors on equal work; write tables, a page and a verdict on each target.

    No time counts unless all competitors end with the adapters that plain PEFT trains. Wants an idle machine.
    """
    if page:
        if any((size, populations, repeats, competitors, engine_only, random_base, quick, as_json)):
            raise ConfigError("--page measures nothing and can be combined with --output only")
        _write_page(output or page[0], list(map(_read_facts, page)))
        return
    if quick and (size or repeats or competitors):
        raise ConfigError("--quick chooses sizes, competitors and repeats; leave it out to choose them yourself")
    if populations and SizeName.CLIENTS not in (size or ()):
        raise ConfigError("--populations needs --size clients")
    if strangers := set(competitors or "") - set(LETTERS):
        raise ConfigError(f"--competitors {competitors!r}: {', '.join(sorted(strangers))} is not one of {LETTERS}")
    startup.prepare()  # for all competitors alike: their processes inherit this environment
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # Transformers warns of its own attributes, and breaks the progress bar
    from copra_fl.bench import findings, gpu, population, sizes, summary
    from copra_fl.bench.verdict import paragraphs

    console = plain_console(stderr=True)
    stem = (output or _default_output()).absolute()
    check_writable("--output", stem.parent)
    stem.parent.mkdir(parents=True, exist_ok=True)
    compared = [name for name in size or DEFAULT_SIZES if name in sizes.SIZES]
    chosen = list(sizes.QUICK_SIZES.values()) if quick else [sizes.SIZES[name] for name in compared]
    letters = QUICK_LETTERS if quick else competitors or LETTERS
    repeats = 1 if quick else repeats or DEFAULT_REPEATS
    facts: findings.BenchFacts = {
        "command": shlex.join(["copra-fl", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "versions": provenance.versions(),
        "repeats": repeats,
        "sizes": {},
    }
    if SizeName.CLIENTS in (size or ()):
        facts["clients"] = population.measure(_numbers(populations) or population.POPULATIONS, console.print)
    if SizeName.GPU in (size or ()):
        facts["gpu"] = gpu.measure(repeats, console.print)
    _store(facts, stem)
    for chosen_size in chosen:
        facts["sizes"][chosen_size.name] = _measure(
            chosen_size, repeats, letters, engine_only or quick, random_base, console
        )
        _store(facts, stem)  # after each size, because the next one can take an hour
    sentences = [*summary.left_out(facts), *paragraphs(facts)]
    _print_tables(_tables(facts), sentences, console if as_json else plain_console())
    console.print(f"results: {stem}.json, {stem}.md", soft_wrap=True)
    try:
        _write_page(stem, [facts])
    except ImportError as error:  # a GPU machine may lack plotly
        console.print(
            f"no page: {error}. Write it on another machine: copra-fl bench --page {stem.name}.json", soft_wrap=True
        )
    if as_json:
        print(json.dumps(summary.summary(facts), indent=2))


def _numbers(populations: str | None) -> list[int]:
    """Return the numbers of --populations; none without the option. Raises ConfigError."""
    words = [word.strip() for word in (populations or "").split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) >= MIN_POPULATION for word in words):
        raise ConfigError(
            f"--populations {populations!r}: must be numbers of clients of at least {MIN_POPULATION}, for example "
            "100,1000"
        )
    return [int(word) for word in words]


def _store(facts: dict[str, Any], stem: Path) -> None:
    """Write the results so far as JSON and as Markdown."""
    from copra_fl.files import write_json

    write_json(stem.with_suffix(".json"), facts)
    stem.with_suffix(".md").write_text(_markdown(facts), encoding="utf-8")


def _tables(facts: dict[str, Any]) -> list[DataTable]:
    from copra_fl.bench import findings, gpu, population

    return [*findings.tables(facts), *population.tables(facts), *gpu.tables(facts)]


def _print_tables(tables: list[DataTable], sentences: list[str], console: Console) -> None:
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(sentence)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--page {path}: {error}") from error
    if not isinstance(facts, dict) or "sizes" not in facts:
        raise ConfigError(f"--page {path} is not a result file of copra-fl bench")
    return facts


def _write_page(stem: Path, results: list[dict[str, Any]]) -> None:
    from copra_fl.bench.report import render

    path = stem.absolute().with_suffix(".html")
    path.write_text(render(results), encoding="utf-8")
    plain_console(stderr=True).print(f"page: {path}", soft_wrap=True)


def _machine() -> dict[str, Any]:
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return provenance.machine() | gpu


def _measure(
    size: Size, repeats: int, letters: str, engine_only: bool, random_base: bool, console: Console
) -> dict[str, Any]:
    """Measure one size; return its results."""
    import torch

    from copra_fl.bench import findings, runner, simulations, sizes, steps, workers

    name, gpu = size.name, torch.cuda.is_available()
    competitors = [
        competitor
        for competitor in runner.COMPETITORS
        if competitor.letter in letters and not (engine_only and competitor.on_flower)
    ]
    workload = sizes.prepare(size, random_base, as_file=not engine_only)
    cores = os.cpu_count() or 1
    splits = runner.core_splits(cores, size.clients, gpu)[: None if size.all_core_splits else 1]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = runner.num_runs(competitors, splits, repeats, size) + size.schedule * steps.num_runs(repeats)
        task = progress.add_task(name, total=total)

        def show(what: str) -> None:
            progress.update(task, description=f"{name}: {what}", advance=1)
            if not console.is_terminal:
                console.print(f"{name}: {what}", soft_wrap=True)

        results = runner.run_all(workload, competitors, splits, repeats, show)
        facts = findings.size_facts(workload, results)
        by_letter = {result.competitor.letter: result for result in results}
        if size.scaling and "g" in by_letter:
            runs = runner.scale(workload, by_letter["g"], repeats, show)
            adapter = workers.start_adapter(by_letter["g"].config)
            facts["scaling"] = findings.scaling_facts(runs, adapter)
            if "e" in by_letter:
                show("copra-fl simulate, first round")
                result = by_letter["e"]
                facts["simulate_first_round"] = [
                    simulations.first_round_of_simulate(result.config, result.core_split) for _ in range(repeats)
                ]
        if size.schedule and "g" in by_letter:
            whole = workers.CoreSplit(1, cores)
            facts["schedule"] = asdict(steps.measure(workload, by_letter["g"], whole, repeats, show))
    return facts


def _default_output() -> Path:
    """Return a dated name in experiments/results in a checkout, else in the current folder."""
    folder = Path("experiments/results") if Path("experiments").is_dir() else Path()
    return folder / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"


def _markdown(facts: dict[str, Any]) -> str:
    from copra_fl.bench import findings, summary
    from copra_fl.bench.verdict import paragraphs

    origin = [
        f"`{facts['command']}`",
        f"{findings.machine(facts)}, {facts['machine']['system']}, {facts['date']}, {facts['repeats']} repeats",
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        *summary.left_out(facts),
    ]
    verdict = "\n".join(f"- {sentence}" for sentence in paragraphs(facts))
    shown = "\n".join(table.markdown() for table in _tables(facts))
    return "# Benchmark\n\n" + "\\\n".join(origin) + f"\n\n{verdict}\n\n{shown}"
