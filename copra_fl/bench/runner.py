"""Run the competitors: the equality check, the faster split of the cores, the repeats, scaling with more clients.

(a) and (b) are the ways of Flower's users, (c) is the way of PEFT's users without Flower, all with the defaults of
Transformers: float32 and sdpa. (B) and (C) are the same programs with the dtype and attention that this package
chooses. (d) to (g) are this package. Each run of a competitor trains LoRA and CopRA (see `sizes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

from copra_fl.adapters.state import Adapter, difference, norm
from copra_fl.bench import simulations, workers
from copra_fl.bench.flops import phase_flops
from copra_fl.bench.sizes import SYNTHETIC, TRAININGS, WARM_UP, Size, Workload, open_data
from copra_fl.bench.workers import CoreSplit, TimedRun
from copra_fl.config import Config, ModelConfig
from copra_fl.simulation.superlink import RunFailed

#: (configuration of each phase, start, split of the cores, whether to measure memory) -> the run
RunPhases = Callable[[dict[str, Config], Adapter, CoreSplit, bool], TimedRun]
#: called with a description of the run that begins
Announce = Callable[[str], None]

#: dtype -> largest allowed ||adapter - reference|| / ||reference - start|| after the first round of a phase, and after
#: its last round. Adam turns the rounding error of a tiny gradient into a whole step, so differences grow. In float32
#: the reference in another split of the cores differs by 1e-4 after three rounds, our engine by 1.2e-4 after one round
#: of CopRA with large steps; in bfloat16 our engine by 0.1.
#: A competitor that trains one step less out of six differs by 0.2.
TOLERANCE = {"float32": (3e-4, 1e-3), "bfloat16": (0.1, 0.15)}


class Disagreement(RunFailed):
    """A competitor does not train what the reference trains, so none of its times count."""


@dataclass(frozen=True)
class Competitor:
    """One way to train the clients of a workload.

    Attributes:
        letter: its short name.
        dtype, attention: of the base model, as in the configuration.
        run: runs all phases.
        on_flower: needs Flower and Ray.
    """

    letter: str
    name: str
    dtype: str
    attention: str
    run: RunPhases
    on_flower: bool = False

    def configs(self, workload: Workload) -> dict[str, Config]:
        return workload.configs(self.dtype, self.attention)

    def __str__(self) -> str:
        return f"({self.letter}) {self.name}"


COMPETITORS = [
    Competitor("a", "Flower + Ray, reload per message", "float32", "sdpa",
               partial(simulations.run_baseline, warm=False), on_flower=True),
    Competitor("b", "Flower + Ray, warm actors", "float32", "sdpa",
               partial(simulations.run_baseline, warm=True), on_flower=True),
    Competitor("c", "PEFT loop in process", "float32", "sdpa", partial(workers.run, workers.open_peft_baseline)),
    Competitor("B", "Flower + Ray, warm actors, our dtype", "auto", "auto",
               partial(simulations.run_baseline, warm=True), on_flower=True),
    Competitor("C", "PEFT loop in process, our dtype", "auto", "auto",
               partial(workers.run, workers.open_peft_baseline)),
    Competitor("d", "copra-fl, one client per node", "auto", "auto",
               partial(simulations.run_copra_fl, one_client_per_node=True), on_flower=True),
    Competitor("e", "copra-fl, cohorts", "auto", "auto",
               partial(simulations.run_copra_fl, one_client_per_node=False), on_flower=True),
    Competitor("f", "copra-fl engine in process, float32", "float32", "auto",
               partial(workers.run, workers.open_copra_fl)),
    Competitor("g", "copra-fl engine in process", "auto", "auto", partial(workers.run, workers.open_copra_fl)),
]  # fmt: skip


@dataclass(frozen=True)
class CompetitorResult:
    """All runs of a competitor at one size.

    Attributes:
        core_split: the faster split of the cores.
        trials: the run in each split, with memory measured.
        runs: the repeats, in `core_split`.
        errors: phase -> largest difference from the reference at the end of the phase, as in `TOLERANCE`.
        flops: training -> floating point operations of all its rounds.
        matmul_rate: floating point operations per second of matrix products in its dtype and split of the cores.
    """

    competitor: Competitor
    config: Config
    core_split: CoreSplit
    trials: dict[CoreSplit, TimedRun]
    runs: list[TimedRun]
    errors: dict[str, float]
    flops: dict[str, int]
    matmul_rate: float


def core_splits(cores: int, num_clients: int, gpu: bool) -> list[CoreSplit]:
    """Return the splits of the cores to try; with a GPU, one process uses it alone."""
    num_workers = min(cores, num_clients)
    splits = [CoreSplit(1, cores)] if gpu else [CoreSplit(num_workers, cores // num_workers), CoreSplit(1, cores)]
    return list(dict.fromkeys(splits))


def num_runs(competitors: list[Competitor], splits: list[CoreSplit], repeats: int, size: Size) -> int:
    """Return the number of runs of `run_all` and `scale`, with one reference for each dtype and attention."""
    references = {(competitor.dtype, competitor.attention) for competitor in competitors}
    return len(references) + len(competitors) * (len(splits) + repeats) + len(size.scaling) * (1 + repeats)


def run_all(
    workload: Workload, competitors: list[Competitor], splits: list[CoreSplit], repeats: int, announce: Announce
) -> list[CompetitorResult]:
    """Run every competitor in every split of the cores; then all in turn, `repeats` times, each in its faster split.

    All runs pass the equality check. Raises Disagreement, RunFailed.
    """
    equality = EqualityCheck(workload, splits[-1], announce)

    def run(competitor: Competitor, split: CoreSplit, memory: bool, occasion: str) -> TimedRun:
        start = equality.start(competitor)
        announce(f"{competitor}, {split}, {occasion}")
        timed = competitor.run(competitor.configs(workload), start, split, memory)
        equality.check(competitor, timed)
        return timed

    trials = {
        competitor.letter: {split: run(competitor, split, True, "trial") for split in splits}
        for competitor in competitors
    }
    faster = {letter: min(by_split, key=lambda split: by_split[split].steady_seconds)
              for letter, by_split in trials.items()}  # fmt: skip
    runs: dict[str, list[TimedRun]] = {competitor.letter: [] for competitor in competitors}
    for repeat in range(1, repeats + 1):
        for competitor in competitors:
            letter = competitor.letter
            runs[letter].append(run(competitor, faster[letter], False, f"repeat {repeat}/{repeats}"))
    matmul_rate = cache(workers.matmul_rate)
    results = []
    for competitor in competitors:
        letter, configs = competitor.letter, competitor.configs(workload)
        config, split = configs[WARM_UP], faster[letter]
        flops = {training: phase_flops(configs[training], open_data(configs[training])) for training in TRAININGS}
        rate = matmul_rate(split, config.model.dtype, config.model.device)
        errors = equality.errors[letter]
        results.append(CompetitorResult(competitor, config, split, trials[letter], runs[letter], errors, flops, rate))
    return results


class EqualityCheck:
    """Compares competitors with plain PEFT, one client after the other (`training.single.train_client`), and `fedavg`.

    There is one reference for each dtype and attention, so that the training is compared and not the kernels.

    Attributes:
        errors: letter of a competitor -> phase -> largest difference seen at the end of the phase.
    """

    def __init__(self, workload: Workload, split: CoreSplit, announce: Announce) -> None:
        self._workload, self._split, self._announce = workload, split, announce
        self._references: dict[ModelConfig, tuple[Adapter, TimedRun]] = {}
        self.errors: dict[str, dict[str, float]] = {}

    def start(self, competitor: Competitor) -> Adapter:
        """Return the adapter from which `competitor` starts; PEFT rounds its random values to the dtype of the base."""
        return self._reference(competitor)[0]

    def check(self, competitor: Competitor, run: TimedRun) -> None:
        """Raise Disagreement if a phase of `run` ends with another adapter than the reference."""
        start, reference = self._reference(competitor)
        dtype = competitor.configs(self._workload)[WARM_UP].model.dtype
        errors = self.errors.setdefault(competitor.letter, {})
        for phase, adapters in run.adapters.items():
            expected = reference.adapters[phase]
            for when, position, allowed in zip(("first", "last"), (0, -1), TOLERANCE[dtype], strict=True):
                change = norm(difference(expected[position], start))
                error = norm(difference(adapters[position], expected[position])) / change
                if not error <= allowed:
                    raise Disagreement(
                        f"{competitor} does not train what plain PEFT trains, so no time counts: after the {when} "
                        f"round of phase {phase} at size {self._workload.size.name} its adapter differs from the "
                        f"reference by {error:.2g} of the change in training; {allowed:g} is allowed in {dtype}"
                    )
            errors[phase] = max(error, errors.get(phase, 0.0))

    def _reference(self, competitor: Competitor) -> tuple[Adapter, TimedRun]:
        configs = self._workload.configs(competitor.dtype, competitor.attention, engine="peft")
        model = configs[WARM_UP].model
        if model not in self._references:
            self._announce(f"reference, {model.dtype}, {model.attention}")
            start = workers.start_adapter(configs[WARM_UP])
            run = workers.run(workers.open_copra_fl, configs, start, self._split, False)
            self._references[model] = start, run
        return self._references[model]


def scale(workload: Workload, result: CompetitorResult, repeats: int, announce: Announce) -> dict[int, list[TimedRun]]:
    """Run `result`'s competitor with each number of clients of the size; return the runs by number of clients.

    The first run of each number measures memory and not time.
    """
    runs: dict[int, list[TimedRun]] = {clients: [] for clients in workload.size.scaling}
    for repeat in range(repeats + 1):
        for clients in runs:
            announce(f"{result.competitor}, {clients} clients, {f'repeat {repeat}/{repeats}' if repeat else 'memory'}")
            size = replace(workload.size, clients=clients)
            configs = result.competitor.configs(replace(workload, size=size, dataset=SYNTHETIC))
            split = replace(result.core_split, workers=min(result.core_split.workers, clients))
            start = workers.start_adapter(configs[WARM_UP])
            runs[clients].append(result.competitor.run(configs, start, split, repeat == 0))
    return runs
