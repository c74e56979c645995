"""Contestants without Flower and Ray: worker processes that share the clients out among themselves.

Each worker trains its clients and answers with their average; averaging the workers' averages ends the round. Workers
are forked from a server process that has imported everything and computed nothing, so they start in no time. No flwr,
no ray: this runs on a machine that has torch, transformers and peft alone.
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
from copra_fl.bench import usual
from copra_fl.bench.sampling import Round, Sampler
from copra_fl.bench.sizes import NUM_LABELS, TRAININGS, WARM_UP, open_data
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.models.build import build_model, choose_device
from copra_fl.simulation.superlink import RunFailed
from copra_fl.training.batches import plan_steps
from copra_fl.training.engine import open_engine
from copra_fl.training.plan import Plan, Start

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

MATMUL_SECONDS = 1.0
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Share:
    """How a contestant uses the machine's cores."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} x {self.threads}"


@dataclass(frozen=True)
class Run:
    """What one run of a contestant gave, phase by phase.

    Attributes:
        started: when its command began, seconds of `time.time`.
        adapters: the global adapter after each round.
        peak_memory: of all its processes together (0 where it was not watched), and of GPUs, in bytes.
    """

    started: float
    rounds: dict[str, list[Round]]
    adapters: dict[str, list[Adapter]]
    cpu_seconds: dict[str, float]
    peak_memory: int

    @classmethod
    def watched(
        cls,
        started: float,
        rounds: dict[str, list[Round]],
        adapters: dict[str, list[Adapter]],
        sampler: Sampler,
        on_device: int = 0,
    ) -> Run:
        """A run whose processes `sampler` has watched, and that took `on_device` bytes of GPUs."""
        cpu_seconds = {phase: sampler.cpu_seconds(each) for phase, each in rounds.items()}
        return cls(started, rounds, adapters, cpu_seconds, sampler.peak + on_device)

    def seconds(self, phase: str) -> float:
        return sum(r.seconds for r in self.rounds[phase])

    @property
    def steady_seconds(self) -> float:
        """Seconds of all rounds that are timed."""
        return sum(map(self.seconds, TRAININGS))

    @property
    def first_round(self) -> float:
        """Seconds of the first round, in which much is opened that stays warm."""
        return self.rounds[WARM_UP][0].seconds

    @property
    def to_first_round(self) -> float:
        """Seconds from the command to the end of the first round."""
        return self.rounds[WARM_UP][0].end - self.started


#: the updates of a plan's clients, from the global adapter
Train = Callable[[Plan, Adapter], list[Update]]
#: opens in a worker what a contestant trains with
Opener = Callable[[Config, FederatedData], Train]


def open_ours(config: Config, data: FederatedData) -> Train:
    """The engine that `config` names, used as clients/node.py uses it."""
    engine = open_engine(config.training.engine, config.model, config.copra.gate_group, NUM_LABELS, seed=0)

    def train(plan: Plan, adapter: Adapter) -> list[Update]:
        parts = engine.slices(data, plan)
        starts = dict.fromkeys(plan.clients, Start(adapter))
        return [u for part in parts for u in engine.train(data, plan, part, starts, lambda number: None)]

    return train


def open_usual(config: Config, data: FederatedData) -> Train:
    """One PEFT model for all clients, one after the other."""
    model = usual.Classifier(config.model, NUM_LABELS)

    def train(plan: Plan, adapter: Adapter) -> list[Update]:
        updates = []
        for client in plan.clients:
            steps = plan_steps(plan, data, client, len(model.layers))
            model.write(adapter)
            loss = usual.train(model, data, steps, plan.config.training)
            updates.append(Update(client, model.read(), len(data.train[client]), (), {"loss": loss}))
        return updates

    return train


def run(opener: Opener, configs: dict[str, Config], start: Adapter, share: Share, memory: bool) -> Run:
    """All phases of `configs`, each from `start`, in `share.workers` processes."""
    started = time.time()
    rounds: dict[str, list[Round]] = {}
    adapters: dict[str, list[Adapter]] = {}
    layout = Layout.by_name(start)
    with crew(opener, configs[WARM_UP], layout, share) as (processes, pipes):
        with Sampler(lambda: processes, memory) as sampler:
            for phase, config in configs.items():
                row, rounds[phase], adapters[phase] = layout.flatten(start).numpy(), [], []
                for server_round in range(1, config.federation.num_rounds + 1):
                    begun = time.time()
                    row = train_round(pipes, config, server_round, row)
                    rounds[phase].append(Round(begun, time.time()))
                    adapters[phase].append(layout.unflatten(torch.from_numpy(row)))
        for pipe in pipes:
            pipe.send(None)
        on_device = sum(pipe.recv() for pipe in pipes)
    return Run.watched(started, rounds, adapters, sampler, on_device)


@contextmanager
def crew(
    opener: Opener, config: Config, layout: Layout, share: Share
) -> Iterator[tuple[list[psutil.Process], list[Connection]]]:
    """The processes to watch (the workers, and the server they were forked from) and a pipe to each worker."""
    workers, pipes = [], []
    for number in range(share.workers):
        ours, theirs = PROCESSES.Pipe()
        clients = tuple(range(number, config.data.num_clients, share.workers))
        worker = PROCESSES.Process(
            target=_work, args=(theirs, opener, config, layout, clients, share.threads), daemon=True
        )
        worker.start()
        theirs.close()
        workers.append(worker)
        pipes.append(ours)
    watched = [psutil.Process(worker.pid) for worker in workers]
    try:
        yield [psutil.Process(watched[0].ppid()), *watched], pipes
    except EOFError:
        raise RunFailed("a worker process of the benchmark failed; its error is above") from None
    finally:
        for worker in workers:
            worker.join(timeout=1)
            worker.kill()


def start_adapter(config: Config) -> Adapter:
    """The adapter that a federation of `config` starts from: what `copra_fl.models.adapted.build` draws."""
    model = config.changed(device="cpu").model
    return build_model(model, config.copra.gate_group, NUM_LABELS, config.federation.seed).read_adapter()


def train_round(pipes: list[Connection], config: Config, server_round: int, row: np.ndarray) -> np.ndarray:
    """A round of all workers of a `crew`, from the adapter `row`; returns the next one."""
    for pipe in pipes:
        pipe.send((config, server_round, row))
    averages, weights = zip(*(pipe.recv() for pipe in pipes), strict=True)
    return np.average(averages, axis=0, weights=weights).astype(np.float32)


def _work(
    pipe: Connection, opener: Opener, config: Config, layout: Layout, clients: tuple[int, ...], threads: int
) -> None:
    """A worker's life: rounds until there is no other, then how much memory it took on the GPU."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(threads)
    train = opener(config, open_data(config))
    with suppress(EOFError, BrokenPipeError):  # the benchmark was stopped
        while (job := pipe.recv()) is not None:
            config, server_round, row = job
            adapter = layout.unflatten(torch.from_numpy(row))
            updates = train(Plan(server_round, clients, config), adapter)
            average = layout.flatten(weighted_average(adapter, updates, "examples", {})).numpy()
            pipe.send((average, sum(update.num_examples for update in updates)))
        pipe.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def matmul_rate(share: Share, dtype: str, device: str) -> float:
    """Floating point operations per second of large square matrix products, all workers multiplying at once."""
    with PROCESSES.Pool(share.workers) as pool:
        return sum(pool.starmap(_multiply, [(share.threads, dtype, device)] * share.workers, chunksize=1))


def _multiply(threads: int, dtype: str, device: str) -> float:
    torch.set_num_threads(threads)
    where = choose_device(device)
    side = MATMUL_SIDE[where.type]
    matrix = torch.randn(side, side, device=where).to(getattr(torch, dtype))
    rates: list[float] = []
    deadline = time.perf_counter() + MATMUL_SECONDS
    while not rates or time.perf_counter() < deadline:
        begun = time.perf_counter()
        (matrix @ matrix).flatten()[0].item()  # waits for a GPU
        rates.append(2 * side**3 / (time.perf_counter() - begun))
    return float(np.median(rates))
