"""`copra-fl compare`: several methods over several seeds, one Flower run, one report."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from copra_fl.cli import options
from copra_fl.cli.flower import Workers, superlink
from copra_fl.cli.recipes import Recipe
from copra_fl.config import Config, ConfigError


def compare(
    recipe: options.RecipeOption = None,
    set_: options.SetOption = None,
    methods: options.MethodsOption = "lora,copra",
    seeds: options.SeedsOption = "0,1",
    output: options.OutputOption = None,
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusOption = 0.0,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods seed by seed, with one Flower run; ends in a table, summary.json and report.html."""
    from copra_fl.cli import preflight, progress
    from copra_fl.report import write
    from copra_fl.results import table

    console = Console(stderr=True)
    directory = options.open_output(output, "compare", resume, overwrite)
    plan = directory / "comparison.toml"
    if resume and plan.exists() and recipe is None and not set_:
        configs = {path.parent.name: Config.from_toml(path) for path in sorted(directory.glob("*/config.toml"))}
    else:
        settings, numbers = Recipe.read(recipe or "base", set_ or []), parse_seeds(seeds)
        names = {Path(name.strip()).stem: name.strip() for name in methods.split(",")}
        configs = {
            f"{stem}-seed{seed}": settings.config(name, seed) for seed in numbers for stem, name in names.items()
        }
        plan.write_text(f"methods = {json.dumps(list(names))}\nseeds = {numbers}\n", encoding="utf-8")
    configs = dict(zip(configs, preflight.check(configs.values(), console), strict=True))
    for name, config in configs.items():
        options.write_config(directory / name, config)
    shares = Workers.share(options.number_of_workers(workers, *configs.values()), gpus_per_worker)
    with superlink(directory / "flower.log") as link:
        run = link.start_run({"output": str(directory), "resume": resume}, shares)
        progress.watch(link, run, len(configs), console)
    summary = write(directory)
    console.print(table(summary))
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    if as_json:
        print(json.dumps(summary, indent=2))


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers. Raises ConfigError for anything else."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not a list of whole numbers like 0,1,2") from None
