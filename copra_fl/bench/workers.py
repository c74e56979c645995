"""Competitors without Flower and Ray: worker processes that divide the clients among themselves.

Each worker trains its clients and returns their average; the average of the workers' averages ends the round. Workers
are forked from a server process that has imported everything and computed nothing, so they start fast. This module
needs neither flwr nor ray: it runs with torch, transformers and peft only.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import psutil
import torch

from copra_fl.adapters.state import Adapter, Layout, Update
from copra_fl.aggregation.rules.fedavg import weighted_average
from copra_fl.bench import peft_baseline
from copra_fl.bench.sampling import Sampler, TimedRound
from copra_fl.bench.sizes import NUM_LABELS, TRAININGS, WARM_UP, open_data
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.models.build import build_model, choose_device
from copra_fl.simulation.superlink import RunFailed
from copra_fl.training.batches import plan_steps
from copra_fl.training.engine import engine_of, train_all
from copra_fl.training.plan import Plan, Start

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

MATMUL_SECONDS = 1.0
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class CoreSplit:
    """The division of the machine's cores into worker processes and threads of each."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} x {self.threads}"


@dataclass(frozen=True)
class TimedRun:
    """One run of a competitor; dictionaries are by phase.

    Attributes:
        started: start of its command, in seconds of `time.time`.
        adapters: the global adapter after each round.
        peak_memory: bytes of all its processes together (0 if not measured) and of GPUs.
    """

    started: float
    rounds: dict[str, list[TimedRound]]
    adapters: dict[str, list[Adapter]]
    cpu_seconds: dict[str, float]
    peak_memory: int

    @classmethod
    def sampled(
        cls,
        started: float,
        rounds: dict[str, list[TimedRound]],
        adapters: dict[str, list[Adapter]],
        sampler: Sampler,
        on_device: int = 0,
    ) -> TimedRun:
        """Return a run with the CPU seconds and memory of `sampler`, and `on_device` bytes of GPUs."""
        cpu_seconds = {phase: sampler.cpu_seconds(timed) for phase, timed in rounds.items()}
        return cls(started, rounds, adapters, cpu_seconds, sampler.peak + on_device)

    def seconds(self, phase: str) -> float:
        return sum(timed.seconds for timed in self.rounds[phase])

    @property
    def steady_seconds(self) -> float:
        """Seconds of all rounds but the warm-up."""
        return sum(map(self.seconds, TRAININGS))

    @property
    def first_round(self) -> float:
        """Seconds of the first round, which also loads model and data."""
        return self.rounds[WARM_UP][0].seconds

    @property
    def to_first_round(self) -> float:
        """Seconds from the command to the end of the first round."""
        return self.rounds[WARM_UP][0].end - self.started


#: trains the clients of a plan from the global adapter
Train = Callable[[Plan, Adapter], list[Update]]
#: loads a competitor's model in a worker process
OpenTrain = Callable[[Config, FederatedData], Train]


def open_copra_fl(config: Config, data: FederatedData) -> Train:
    """Open the engine that `config` names, used as the ClientApp uses it."""
    engine = engine_of(config, NUM_LABELS)

    def train(plan: Plan, adapter: Adapter) -> list[Update]:
        return train_all(engine, data, plan, dict.fromkeys(plan.clients, Start(adapter)))

    return train


def open_peft_baseline(config: Config, data: FederatedData) -> Train:
    """Open one PEFT model that trains all clients, one after the other."""
    model = peft_baseline.Classifier(config.model, NUM_LABELS)

    def train(plan: Plan, adapter: Adapter) -> list[Update]:
        updates = []
        for client in plan.clients:
            steps = plan_steps(plan, data, client, len(model.layers))
            model.write(adapter)
            loss = peft_baseline.train(model, data, steps, plan.config.training)
            updates.append(Update(client, model.read(), len(data.train[client]), (), {"loss": loss}))
        return updates

    return train


def run(open_train: OpenTrain, configs: dict[str, Config], start: Adapter, split: CoreSplit, memory: bool) -> TimedRun:
    """Run all phases of `configs`, each from `start`, in `split.workers` processes."""
    started = time.time()
    rounds: dict[str, list[TimedRound]] = {}
    adapters: dict[str, list[Adapter]] = {}
    layout = Layout.by_name(start)
    with worker_pool(open_train, configs[WARM_UP], layout, split) as (processes, pipes):
        with Sampler(lambda: processes, memory) as sampler:
            for phase, config in configs.items():
                row, rounds[phase], adapters[phase] = layout.flatten(start).numpy(), [], []
                for server_round in range(1, config.federation.num_rounds + 1):
                    begin = time.time()
                    row = train_round(pipes, config, server_round, row)
                    rounds[phase].append(TimedRound(begin, time.time()))
                    adapters[phase].append(layout.unflatten(torch.from_numpy(row)))
        for pipe in pipes:
            pipe.send(None)
        on_device = sum(pipe.recv() for pipe in pipes)
    return TimedRun.sampled(started, rounds, adapters, sampler, on_device)


@contextmanager
def worker_pool(
    open_train: OpenTrain, config: Config, layout: Layout, split: CoreSplit
) -> Iterator[tuple[list[psutil.Process], list[Connection]]]:
    """Start the workers; yield the processes to sample (workers and their fork server) and a pipe to each worker."""
    workers, pipes = [], []
    for number in range(split.workers):
        pipe, worker_end = PROCESSES.Pipe()
        clients = tuple(range(number, config.data.num_clients, split.workers))
        worker = PROCESSES.Process(
            target=_worker_main, args=(worker_end, open_train, config, layout, clients, split.threads), daemon=True
        )
        worker.start()
        worker_end.close()
        workers.append(worker)
        pipes.append(pipe)
    processes = [psutil.Process(worker.pid) for worker in workers]
    try:
        yield [psutil.Process(processes[0].ppid()), *processes], pipes
    except EOFError:
        raise RunFailed("a worker process of the benchmark failed; see its error above") from None
    finally:
        for worker in workers:
            worker.join(timeout=1)
            worker.kill()


def start_adapter(config: Config) -> Adapter:
    """Return the adapter from which a federation of `config` starts, as `build_model` draws it."""
    model = config.changed(device="cpu").model
    return build_model(model, config.copra.gate_group, NUM_LABELS, config.federation.seed).read_adapter()


def train_round(pipes: list[Connection], config: Config, server_round: int, row: np.ndarray) -> np.ndarray:
    """Train one round in all workers of a `worker_pool`, from the adapter `row`; return the next adapter."""
    for pipe in pipes:
        pipe.send((config, server_round, row))
    averages, weights = zip(*(pipe.recv() for pipe in pipes), strict=True)
    return np.average(averages, axis=0, weights=weights).astype(np.float32)


def _worker_main(
    pipe: Connection, open_train: OpenTrain, config: Config, layout: Layout, clients: tuple[int, ...], threads: int
) -> None:
    """Train rounds until the pipe sends None, then send the peak memory on the GPU."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(threads)
    train = open_train(config, open_data(config))
    with suppress(EOFError, BrokenPipeError):  # the benchmark was stopped
        while (job := pipe.recv()) is not None:
            config, server_round, row = job
            pipe.send(_trained_average(train, Plan(server_round, clients, config), layout, row))
        pipe.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _trained_average(train: Train, plan: Plan, layout: Layout, row: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the average of the clients of `plan`, trained from the adapter `row`, and their number of examples.

    The updates are freed on return; otherwise they would add to the memory of the next round.
    """
    adapter = layout.unflatten(torch.from_numpy(row))
    updates = train(plan, adapter)
    average = layout.flatten(weighted_average(adapter, updates, "examples", {})).numpy()
    return average, sum(update.num_examples for update in updates)


def matmul_rate(split: CoreSplit, dtype: str, device: str) -> float:
    """Return floating point operations per second of large square matrix products, in all workers at the same time."""
    with PROCESSES.Pool(split.workers) as pool:
        return sum(pool.starmap(measure_matmul_rate, [(split.threads, dtype, device)] * split.workers, chunksize=1))


def measure_matmul_rate(threads: int, dtype: str, device: str) -> float:
    """Return the same of this process, with `threads` threads."""
    torch.set_num_threads(threads)
    torch_device = choose_device(device)
    side = MATMUL_SIDE[torch_device.type]
    matrix = torch.randn(side, side, device=torch_device).to(getattr(torch, dtype))
    rates: list[float] = []
    deadline = time.perf_counter() + MATMUL_SECONDS
    while not rates or time.perf_counter() < deadline:
        begin = time.perf_counter()
        (matrix @ matrix).flatten()[0].item()  # waits for a GPU
        rates.append(2 * side**3 / (time.perf_counter() - begin))
    return float(np.median(rates))
