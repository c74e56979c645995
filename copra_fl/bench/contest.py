"""Who competes, and how: the equality gate, the faster division of the cores, the repeats, growth with more clients.

(a) and (b) are what Flower's users have, (c) is what PEFT's users have without Flower, (d) to (g) are ours. Everything
is measured for LoRA and for CopRA in the same run of a contestant (see `sizes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

from copra_fl.adapters.state import Adapter, difference, norm
from copra_fl.bench import simulations, workers
from copra_fl.bench.flops import phase_flops
from copra_fl.bench.sizes import SYNTHETIC, TRAININGS, WARM_UP, Size, Workload, open_data
from copra_fl.bench.workers import Run, Share
from copra_fl.config import Config, ModelConfig
from copra_fl.simulation.superlink import RunFailed

#: (configuration of each phase, start, division of the cores, whether memory is watched) -> what came of it
Runner = Callable[[dict[str, Config], Adapter, Share, bool], Run]
#: told what runs next
Show = Callable[[str], None]

#: dtype -> ||adapter - reference's|| / ||reference's - start||, at most, after the first round of a phase and after
#: the last. Adam makes a whole step of a rounding error in a tiny gradient, so that differences grow: in float32 the
#: reference differs by 1e-4 after three rounds from itself in another division of the cores, in bfloat16 our engine by
#: 0.1. Who trains one step of six less differs by 0.2.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (0.1, 0.15)}


class Disagreement(RunFailed):
    """A contestant that does not train what the reference trains: none of its times count."""


@dataclass(frozen=True)
class Contestant:
    """
    Attributes:
        letter: its short name.
        dtype, attention: of the base, as in the configuration.
    """

    letter: str
    name: str
    dtype: str
    attention: str
    run: Runner
    on_flower: bool = False

    def configs(self, workload: Workload) -> dict[str, Config]:
        return workload.configs(self.dtype, self.attention)

    def __str__(self) -> str:
        return f"({self.letter}) {self.name}"


CONTESTANTS = [
    Contestant("a", "Flower + Ray, reload per message", "float32", "sdpa",
               partial(simulations.run_baseline, warm=False), on_flower=True),
    Contestant("b", "Flower + Ray, warm actors", "float32", "sdpa",
               partial(simulations.run_baseline, warm=True), on_flower=True),
    Contestant("c", "PEFT loop in process", "float32", "sdpa", partial(workers.run, workers.open_usual)),
    Contestant("d", "ours, one client a node", "auto", "auto",
               partial(simulations.run_ours, one_client_a_node=True), on_flower=True),
    Contestant("e", "ours, cohorts", "auto", "auto",
               partial(simulations.run_ours, one_client_a_node=False), on_flower=True),
    Contestant("f", "our engine in process, float32", "float32", "auto", partial(workers.run, workers.open_ours)),
    Contestant("g", "our engine in process", "auto", "auto", partial(workers.run, workers.open_ours)),
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What came of a contestant at one size.

    Attributes:
        share: the faster division of the cores.
        trials: the run in each division, with memory watched.
        runs: the repeats, in `share`.
        errors: phase -> the largest difference from the reference at the end of a phase, as in `TOLERANCE`.
        flops: training -> what it must compute in all its rounds.
        matmul_rate: operations per second of matrix products in its dtype and division.
    """

    contestant: Contestant
    config: Config
    share: Share
    trials: dict[Share, Run]
    runs: list[Run]
    errors: dict[str, float]
    flops: dict[str, int]
    matmul_rate: float


def divisions(cores: int, num_clients: int, gpu: bool) -> list[Share]:
    """The divisions of the cores that are tried; with a GPU one process has it for itself."""
    most = min(cores, num_clients)
    shares = [Share(1, cores)] if gpu else [Share(most, cores // most), Share(1, cores)]
    return list(dict.fromkeys(shares))


def num_runs(contestants: list[Contestant], shares: list[Share], repeats: int, size: Size) -> int:
    """How often `race` and `scale` run something: contestants, and a reference for each dtype and attention."""
    references = {(contestant.dtype, contestant.attention) for contestant in contestants}
    return len(references) + len(contestants) * (len(shares) + repeats) + len(size.scaling) * (1 + repeats)


def race(
    workload: Workload, contestants: list[Contestant], shares: list[Share], repeats: int, show: Show
) -> list[Result]:
    """Every contestant in every division of the cores; then all in turn, `repeats` times, each in its faster one.

    All runs pass the gate. Raises Disagreement, RunFailed.
    """
    gate = Gate(workload, shares[-1], show)

    def run(contestant: Contestant, share: Share, memory: bool, occasion: str) -> Run:
        start = gate.start(contestant)
        show(f"{contestant}, {share}, {occasion}")
        done = contestant.run(contestant.configs(workload), start, share, memory)
        gate.check(contestant, done)
        return done

    trials = {each.letter: {share: run(each, share, True, "trial") for share in shares} for each in contestants}
    chosen = {letter: min(tried, key=lambda share: tried[share].steady_seconds) for letter, tried in trials.items()}
    runs: dict[str, list[Run]] = {each.letter: [] for each in contestants}
    for repeat in range(1, repeats + 1):
        for each in contestants:
            runs[each.letter].append(run(each, chosen[each.letter], False, f"repeat {repeat}/{repeats}"))
    rate = cache(workers.matmul_rate)
    results = []
    for each in contestants:
        letter, configs = each.letter, each.configs(workload)
        config, share = configs[WARM_UP], chosen[each.letter]
        flops = {training: phase_flops(configs[training], open_data(configs[training])) for training in TRAININGS}
        measured = rate(share, config.model.dtype, config.model.device)
        errors = gate.errors[letter]
        results.append(Result(each, config, share, trials[letter], runs[letter], errors, flops, measured))
    return results


class Gate:
    """Compares contestants with plain PEFT, one client after the other (`training.train_client`) and `fedavg`.

    There is a reference for each dtype and attention, so that what is compared is the training and not the kernels.

    Attributes:
        errors: letter of a contestant -> phase -> the largest difference seen at the end of the phase.
    """

    def __init__(self, workload: Workload, share: Share, show: Show) -> None:
        self._workload, self._share, self._show = workload, share, show
        self._references: dict[ModelConfig, tuple[Adapter, Run]] = {}
        self.errors: dict[str, dict[str, float]] = {}

    def start(self, contestant: Contestant) -> Adapter:
        """The adapter that `contestant` starts from; PEFT rounds what it draws to the dtype of the base."""
        return self._reference(contestant)[0]

    def check(self, contestant: Contestant, run: Run) -> None:
        """Raise Disagreement where a phase of `run` ends elsewhere than the reference's."""
        start, reference = self._reference(contestant)
        dtype = contestant.configs(self._workload)[WARM_UP].model.dtype
        errors = self.errors.setdefault(contestant.letter, {})
        for phase, adapters in run.adapters.items():
            expected = reference.adapters[phase]
            for when, position, allowed in zip(("first", "last"), (0, -1), TOLERANCE[dtype], strict=True):
                change = norm(difference(expected[position], start))
                error = norm(difference(adapters[position], expected[position])) / change
                if not error <= allowed:
                    raise Disagreement(
                        f"{contestant} does not train what plain PEFT trains: after the {when} round of phase {phase} "
                        f"at size {self._workload.size.name} its adapter differs by {error:.2g} of the change in "
                        f"training, and {allowed:g} is allowed in {dtype}. No time counts"
                    )
            errors[phase] = max(error, errors.get(phase, 0.0))

    def _reference(self, contestant: Contestant) -> tuple[Adapter, Run]:
        configs = self._workload.configs(contestant.dtype, contestant.attention, engine="peft")
        model = configs[WARM_UP].model
        if model not in self._references:
            self._show(f"reference, {model.dtype}, {model.attention}")
            start = workers.start_adapter(configs[WARM_UP])
            run = workers.run(workers.open_ours, configs, start, self._share, False)
            self._references[model] = start, run
        return self._references[model]


def scale(workload: Workload, result: Result, repeats: int, show: Show) -> dict[int, list[Run]]:
    """Number of clients -> runs of our engine with so many; in the first of each memory is watched, it is not timed."""
    runs: dict[int, list[Run]] = {clients: [] for clients in workload.size.scaling}
    for repeat in range(repeats + 1):
        for clients in runs:
            show(f"{result.contestant}, {clients} clients, {f'repeat {repeat}/{repeats}' if repeat else 'memory'}")
            size = replace(workload.size, clients=clients)
            configs = result.contestant.configs(replace(workload, size=size, dataset=SYNTHETIC))
            share = replace(result.share, workers=min(result.share.workers, clients))
            start = workers.start_adapter(configs[WARM_UP])
            runs[clients].append(result.contestant.run(configs, start, share, repeat == 0))
    return runs
