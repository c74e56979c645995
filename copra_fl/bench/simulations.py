"""Contestants over Flower and Ray: our apps, and the baselines of experiments/baselines.

Both get the same folder: ``comparison.toml`` names the phases, each phase has its ``config.toml``. One Flower run goes
through them in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from copra_fl.adapter import Adapter, load_checkpoint, save_checkpoint
from copra_fl.bench.sampling import Round, Sampler
from copra_fl.bench.workers import Run, Share
from copra_fl.cli import guard
from copra_fl.cli.flower import RunFailed, Workers, app_directory, superlink
from copra_fl.cli.progress import watch
from copra_fl.config import Config, Value

FLOWER_LOG = "flower.log"


def run_ours(
    configs: dict[str, Config], start: Adapter, share: Share, memory: bool, folder: Path, one_client_a_node: bool
) -> Run:
    """Our apps, a node for each worker or for each client; they draw `start` themselves."""
    _write_configs(configs, folder)
    nodes = next(iter(configs.values())).data.num_clients if one_client_a_node else share.workers
    started, sampler = _simulate({"output": str(folder), "resume": False}, share, nodes, None, memory, folder)
    rounds, adapters = {}, {}
    for phase in configs:
        directory = _phase_folder(folder, phase)
        rows = [json.loads(line) for line in (directory / "journal.jsonl").read_text("utf-8").splitlines()]
        checkpoints = sorted((directory / "checkpoints").iterdir())
        rounds[phase] = []
        for row, checkpoint in zip(rows, checkpoints, strict=True):
            end = checkpoint.stat().st_mtime
            rounds[phase].append(Round(end - row["seconds"], end, row["bytes_down"], row["bytes_up"]))
        adapters[phase], _ = load_checkpoint(checkpoints[-1])
    cpu_seconds = {phase: sampler.cpu_seconds(rounds[phase]) for phase in configs}
    return Run(started, rounds, adapters, cpu_seconds, sampler.peak)


def run_baseline(
    configs: dict[str, Config], start: Adapter, share: Share, memory: bool, folder: Path, warm: bool
) -> Run:
    """The baseline app with a node for each client; `warm`: its actors keep model and data between messages."""
    _write_configs(configs, folder)
    save_checkpoint(folder / "start.safetensors", start, {})
    nodes = next(iter(configs.values())).data.num_clients
    app = app_directory() / "experiments" / "baselines"
    started, sampler = _simulate({"output": str(folder), "warm": warm}, share, nodes, app, memory, folder)
    noted = json.loads((folder / "rounds.json").read_text("utf-8"))
    rounds = {phase: [Round(**row) for row in rows] for phase, rows in noted.items()}
    adapters = {phase: load_checkpoint(folder / f"{phase}.safetensors")[0] for phase in configs}
    cpu_seconds = {phase: sampler.cpu_seconds(rounds[phase]) for phase in configs}
    return Run(started, rounds, adapters, cpu_seconds, sampler.peak)


def first_round_of_simulate(config: Config, share: Share, folder: Path) -> float:
    """Seconds from the start of the command `copra-fl simulate` to its first finished round."""
    recipe, output = folder / "simulate.toml", folder / "run"
    recipe.write_text(config.to_toml(), "utf-8")
    command = [sys.executable, "-c", "from copra_fl.cli import main; main()", "simulate", "--recipe", str(recipe)]
    command += ["--output", str(output), "--workers", str(share.workers)]
    started = time.time()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RunFailed(f"copra-fl simulate failed: {result.stderr}")
    return (output / "checkpoints" / "round-00001.safetensors").stat().st_mtime - started


def _write_configs(configs: dict[str, Config], folder: Path) -> None:
    (folder / "comparison.toml").write_text(f"methods = {json.dumps(list(configs))}\nseeds = [0]\n", "utf-8")
    for phase, config in configs.items():
        directory = _phase_folder(folder, phase)
        directory.mkdir()
        (directory / "config.toml").write_text(config.to_toml(), "utf-8")


def _phase_folder(folder: Path, phase: str) -> Path:
    return folder / f"{phase}-seed0"


def _simulate(
    run_config: dict[str, Value], share: Share, nodes: int, app: Path | None, memory: bool, folder: Path
) -> tuple[float, Sampler]:
    """Run `app` to its end; when that was begun, and what was seen of its processes. Raises RunFailed."""
    started = time.time()
    workers = replace(Workers.share(share.workers), cpus=share.threads, nodes=nodes)
    with superlink(folder / FLOWER_LOG) as link:
        find = partial(guard.marked, link.environment[guard.VARIABLE])
        with Sampler(find, memory) as sampler:
            watch(link, link.start_run(run_config, workers, app), 1, Console(quiet=True))
    return started, sampler
