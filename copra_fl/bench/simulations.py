"""Competitors over Flower and Ray: the apps of this package, and the baselines of experiments/bench.

Both use the same folder: ``comparison.toml`` names the phases, each phase has its ``config.toml``. One Flower run
trains the phases in turn.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from copra_fl.adapters.state import Adapter
from copra_fl.bench.sampling import Sampler, TimedRound, with_descendants
from copra_fl.bench.sizes import WARM_UP
from copra_fl.bench.workers import CoreSplit, TimedRun
from copra_fl.config import Config, Value
from copra_fl.console import plain_console
from copra_fl.simulation.progress import watch
from copra_fl.simulation.superlink import RunFailed, Workers, app_directory, copy_app, superlink
from copra_fl.tensor_files import read_tensors, write_tensors


def run_copra_fl(
    configs: dict[str, Config], start: Adapter, split: CoreSplit, memory: bool, *, one_client_per_node: bool
) -> TimedRun:
    """Run the apps of this package with one node per worker or per client; they draw `start` themselves."""
    nodes = _num_clients(configs) if one_client_per_node else split.workers
    with _folder() as folder:
        _write_configs(configs, folder)
        run_config: dict[str, Value] = {"output": str(folder), "resume": False}
        started, sampler = _simulate(folder, configs, run_config, copy_app, len(configs), split, nodes, memory)
        rounds: dict[str, list[TimedRound]] = {}
        adapters = {}
        for phase in configs:
            directory = _phase_folder(folder, phase)
            rows = [json.loads(line) for line in (directory / "journal.jsonl").read_text("utf-8").splitlines()]
            checkpoints = sorted((directory / "checkpoints").iterdir())
            ends = [checkpoint.stat().st_mtime for checkpoint in checkpoints]
            rounds[phase] = [
                TimedRound(end - row["seconds"], end, row["bytes_down"], row["bytes_up"])
                for end, row in zip(ends, rows, strict=True)
            ]
            adapters[phase] = [read_tensors(checkpoint)[0] for checkpoint in checkpoints]
    return TimedRun.sampled(started, rounds, adapters, sampler)


def run_baseline(configs: dict[str, Config], start: Adapter, split: CoreSplit, memory: bool, *, warm: bool) -> TimedRun:
    """Run the app of the baselines with one node per client; if `warm`, its actors keep model and data in memory."""
    copy = partial(shutil.copytree, app_directory() / "experiments" / "bench")
    with _folder() as folder:
        _write_configs(configs, folder)
        write_tensors(folder / "start.safetensors", start, {})
        run_config: dict[str, Value] = {"output": str(folder), "warm": warm}
        started, sampler = _simulate(folder, configs, run_config, copy, 1, split, _num_clients(configs), memory)
        recorded = json.loads((folder / "rounds.json").read_text("utf-8"))
        rounds = {phase: [TimedRound(**row) for row in rows] for phase, rows in recorded.items()}
        adapters = {
            phase: [read_tensors(folder / f"{phase}-{number}.safetensors")[0] for number in range(1, len(rows) + 1)]
            for phase, rows in recorded.items()
        }
    return TimedRun.sampled(started, rounds, adapters, sampler)


def first_round_of_simulate(config: Config, split: CoreSplit) -> float:
    """Return the seconds from the start of the command `copra-fl simulate` to the end of its first round."""
    with _folder() as folder:
        recipe, output = folder / "simulate.toml", folder / "run"
        recipe.write_text(config.to_toml(), "utf-8")
        command = [sys.executable, "-c", "from copra_fl.cli import main; main()", "simulate", "--recipe", str(recipe)]
        command += ["--output", str(output), "--workers", str(split.workers)]
        started = time.time()
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RunFailed(f"copra-fl simulate failed: {result.stderr}")
        return (output / "checkpoints" / "round-00001.safetensors").stat().st_mtime - started


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a folder for one run; it is kept if the run fails, for its log."""
    folder = Path(tempfile.mkdtemp(prefix="copra-fl-bench-"))
    yield folder
    shutil.rmtree(folder)


def _num_clients(configs: dict[str, Config]) -> int:
    return configs[WARM_UP].data.num_clients


def _write_configs(configs: dict[str, Config], folder: Path) -> None:
    (folder / "comparison.toml").write_text(f"methods = {json.dumps(list(configs))}\nseeds = [0]\n", "utf-8")
    for phase, config in configs.items():
        directory = _phase_folder(folder, phase)
        directory.mkdir()
        (directory / "config.toml").write_text(config.to_toml(), "utf-8")


def _phase_folder(folder: Path, phase: str) -> Path:
    return folder / f"{phase}-seed0"


def _simulate(
    folder: Path,
    configs: dict[str, Config],
    run_config: dict[str, Value],
    copy: Callable[[Path], object],
    num_runs: int,
    split: CoreSplit,
    nodes: int,
    memory: bool,
) -> tuple[float, Sampler]:
    """Run the app that `copy` writes until it has reported the end of `num_runs` runs.

    Returns the start of the command (seconds of `time.time`) and the samples of its processes. Raises RunFailed.
    """
    started = time.time()
    workers = replace(Workers.share(split.workers, num_clients=split.workers), cpus=split.threads, nodes=nodes)
    with superlink(folder / "flower.log", configs.values()) as link:
        command = link.start_run(run_config, workers, copy)
        roots = [psutil.Process(link.guard.pid), psutil.Process(command.pid)]
        with Sampler(partial(with_descendants, roots), memory) as sampler:
            watch(link, command, num_runs, plain_console(quiet=True))
    return started, sampler
