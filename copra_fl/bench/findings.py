"""Results of a benchmark: as plain data, as tables, and compared with the targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from copra_fl.adapters.state import Adapter
from copra_fl.bench.runner import CompetitorResult
from copra_fl.bench.sizes import SIZES, STEADY_ROUNDS, TRAININGS, Workload
from copra_fl.bench.steps import expected_blocks, mean_expected_blocks
from copra_fl.bench.workers import TimedRun
from copra_fl.reporting.data_table import DataTable

#: results as plain data, as they are written to NAME.json
BenchFacts = dict[str, Any]

#: targets: size, competitor (g if e did not run), rival, factor for LoRA, factor for CopRA
RATIOS = [
    ("overhead", "e", "b", 8.0, 8.0),
    ("overhead", "e", "c", 4.0, 4.0),
    ("small", "e", "b", 3.0, 3.0),
    ("small", "e", "c", 3.0, 3.0),
    ("compute", "e", "c", 2.0, 2.3),
    ("compute", "f", "c", 1.1, 1.2),
]
#: the same programs in Transformers' defaults and in our dtype and attention
LIKE_FOR_LIKE = {"b": "B", "c": "C"}
#: competitors to which the others are compared
RIVALS = "bBcC"
#: targets: size -> clients per second of CopRA / of LoRA, with competitor g (e if g did not run)
COPRA_RATIOS = {"overhead": 1.0, "small": 1.05, "compute": 1.1}
#: targets: competitor, share of the matmul rate in LoRA training at size compute
RATES = [("f", 0.8), ("g", 0.6)]
#: target: largest relative spread of the cost per client over the numbers of clients
FLAT = 0.15
#: target: memory of an additional client, in adapters
ADAPTERS = 2.0
#: target: memory of a second worker
WORKER_BYTES = 450e6
#: target: seconds from the command copra-fl simulate to the end of its first round
FIRST_ROUND_SECONDS = 7.0


def competitor_facts(result: CompetitorResult) -> BenchFacts:
    """Return the results of one competitor at one size; lists have one value per repeat."""
    clients, rate = result.config.data.num_clients, result.matmul_rate
    trainings = {}
    for training in TRAININGS:
        rounds = [timed for run in result.runs for timed in run.rounds[training]]
        trainings[training] = {
            "clients_per_second": [clients * STEADY_ROUNDS / run.seconds(training) for run in result.runs],
            "cpu_seconds_per_round": [run.cpu_seconds[training] / STEADY_ROUNDS for run in result.runs],
            "share_of_matmul_rate": [result.flops[training] / run.seconds(training) / rate for run in result.runs],
            "bytes_down_per_round": mean(timed.bytes_down for timed in rounds),
            "bytes_up_per_round": mean(timed.bytes_up for timed in rounds),
            "flops": result.flops[training],
            "error": result.errors[training],
        }
    return {
        "name": result.competitor.name,
        "dtype": result.config.model.dtype,
        "attention": result.config.model.attention,
        "core_split": str(result.core_split),
        "trainings": trainings,
        "first_round_seconds": [run.first_round for run in result.runs],
        "seconds_to_first_round": [run.to_first_round for run in result.runs],
        "trial_seconds": {str(split): run.steady_seconds for split, run in result.trials.items()},
        "peak_memory": {str(split): run.peak_memory for split, run in result.trials.items()},
        "memory_per_extra_worker": _memory_per_extra_worker(result),
        "matmul_rate": rate,
    }


def _memory_per_extra_worker(result: CompetitorResult) -> float | None:
    """Return the bytes of each worker beyond the first; None for a single split of the cores."""
    peaks = sorted((split.workers, run.peak_memory) for split, run in result.trials.items())
    (fewest, low), (most, high) = peaks[0], peaks[-1]
    return (high - low) / (most - fewest) if most > fewest else None


def scaling_facts(runs: Mapping[int, Sequence[TimedRun]], adapter: Adapter) -> BenchFacts:
    """Return cost per client and memory of the engine in process, for increasing numbers of clients."""
    rounds = STEADY_ROUNDS * len(TRAININGS)
    counts = sorted(runs)
    peaks = {clients: runs[clients][0].peak_memory for clients in counts}
    grown = (peaks[counts[-1]] - peaks[counts[-2]]) / (counts[-1] - counts[-2])
    seconds = {str(clients): [run.steady_seconds / rounds / clients for run in runs[clients][1:]] for clients in counts}
    return {
        "seconds_per_client": seconds,
        "peak_memory": {str(clients): peak for clients, peak in peaks.items()},
        "memory_per_extra_client": grown,
        "adapter_bytes": sum(tensor.nbytes for tensor in adapter.values()),
    }


def size_facts(workload: Workload, results: Iterable[CompetitorResult]) -> BenchFacts:
    """Return the results of all competitors at one size."""
    competitors = {result.competitor.letter: competitor_facts(result) for result in results}
    return {"size": asdict(workload.size), "model": Path(workload.model).name, "competitors": competitors}


def machine(facts: BenchFacts) -> str:
    """Return processor and number of cores of the machine; every caption ends with it."""
    hardware = facts["machine"]
    processors = [hardware[key] for key in ("gpu", "processor") if key in hardware]
    return f"{', '.join(processors)}, {hardware['cores']} cores"


def tables(facts: BenchFacts) -> list[DataTable]:
    """Return all tables: the competitors, those of each size, and the targets if any was measured."""
    shown = [competitors(facts)]
    for name in facts["sizes"]:
        shown += size_tables(facts, name)
    verdicts = targets(facts)
    return [*shown, verdicts] if verdicts.rows else shown


def size_tables(facts: BenchFacts, name: str) -> list[DataTable]:
    """Return the tables of one size: speed, work and cost; gains, scaling, CopRA's savings if they were measured."""
    size = facts["sizes"][name]
    shown = [_speed(name, size)]
    if gains := list(split_gains(size["competitors"])):
        shown.append(_gains(name, gains))
    shown += [_work(name, size), _cost(name, size)]
    if "scaling" in size:
        shown.append(_scaling(name, size["scaling"]))
    if "schedule" in size:
        shown.append(_schedule(name, size["schedule"]))
    return [replace(table, caption=f"{table.caption} {machine(facts)}.") for table in shown]


def competitors(facts: BenchFacts) -> DataTable:
    """Return the table of all competitors."""
    rows = {
        letter: [f"({letter})", competitor["name"], f"{competitor['dtype']}, {competitor['attention']}"]
        for size in facts["sizes"].values()
        for letter, competitor in size["competitors"].items()
    }
    return DataTable(["", "competitor", "base"], list(rows.values()), title="Competitors")


def _speed(name: str, size: BenchFacts) -> DataTable:
    competitors, dimensions = size["competitors"], size["size"]
    rivals = [letter for letter in RIVALS if letter in competitors]
    header, rows = ["", "cores"], []
    for training in TRAININGS:
        header += [f"{training}: clients/s", *(f"/ ({rival})" for rival in rivals)]
    for letter, competitor in competitors.items():
        row = [f"({letter})", competitor["core_split"]]
        for training in TRAININGS:
            ratios = [f"{ratio(competitors, letter, rival, training):.2f}" for rival in rivals]
            row += [_spread(competitor["trainings"][training]["clients_per_second"]), *ratios]
        rows.append(row)
    title = (
        f"{name}: {dimensions['clients']} clients, {dimensions['base']}, {dimensions['batch_size']} x "
        f"{dimensions['tokens']} tokens, {dimensions['local_steps']} local steps"
    )
    caption = (
        f"Clients trained per second in all {STEADY_ROUNDS} steady rounds: median (minimum - maximum) over repeats. "
        "Cores: workers x threads, the faster of the splits tried. / (b), / (c): ratio to that competitor; "
        "/ (B), / (C): to the same in our dtype and attention."
    )
    return DataTable(header, rows, caption, title)


@dataclass(frozen=True)
class Gain:
    """A ratio of clients per second to a rival, as a product: `total` = `number_format` * `engine`.

    Attributes:
        letter: our competitor.
        rival: the competitor in Transformers' default dtype and attention.
        number_format: the rival in our dtype and attention / the rival.
        engine: our competitor / the rival in our dtype and attention.
    """

    letter: str
    rival: str
    training: str
    total: float
    number_format: float
    engine: float


def split_gains(competitors: BenchFacts) -> Iterator[Gain]:
    """Yield the gains over each rival that was measured in both dtypes: of (e) over Flower, of (g) in process."""
    for letter, rival in (("e", "b"), ("e", "c"), ("g", "c")):
        fair = LIKE_FOR_LIKE[rival]
        if not {letter, rival, fair} <= competitors.keys():
            continue
        for training in TRAININGS:
            total, engine = (ratio(competitors, letter, other, training) for other in (rival, fair))
            yield Gain(letter, rival, training, total, ratio(competitors, fair, rival, training), engine)


def _gains(name: str, gains: Iterable[Gain]) -> DataTable:
    rows = [
        [
            f"({gain.letter}) / ({gain.rival})",
            gain.training,
            *(f"{factor:.2f}" for factor in (gain.total, gain.number_format, gain.engine)),
        ]
        for gain in gains
    ]
    caption = (
        "Ratios of median clients per second. Number format and attention: the rival in our dtype and attention, "
        "(B) or (C), against itself in float32 with sdpa. Engine: ours against (B) or (C). Their product is the total."
    )
    header = ["", "training", "total", "number format and attention", "engine"]
    return DataTable(header, rows, caption, f"{name}: what the gain is made of")


def _work(name: str, size: BenchFacts) -> DataTable:
    header, rows = [""], []
    for training in TRAININGS:
        header += [f"{training}: CPU s", "of matmul rate", "kB down", "kB up"]
    for letter, competitor in size["competitors"].items():
        row = [f"({letter})"]
        for training in TRAININGS:
            facts = competitor["trainings"][training]
            row += [f"{median(facts['cpu_seconds_per_round']):.2f}", f"{median(facts['share_of_matmul_rate']):.0%}"]
            row += [f"{facts[key] / 1e3:.0f}" for key in ("bytes_down_per_round", "bytes_up_per_round")]
        rows.append(row)
    caption = (
        "Per round. CPU s: CPU seconds of all processes of the competitor; in process, of the workers only. Of matmul "
        "rate: floating point operations of the training (copra_fl/bench/flops.py) divided by those that large matrix "
        "products with the same dtype and split of the cores do in the same time."
    )
    return DataTable(header, rows, caption, f"{name}: work")


def _cost(name: str, size: BenchFacts) -> DataTable:
    header = ["", "first round s", "to first round s", "peak MB", "extra worker MB", "error: lora", "copra"]
    rows = []
    for letter, competitor in size["competitors"].items():
        per_worker = competitor["memory_per_extra_worker"]
        rows.append(
            [
                f"({letter})",
                _spread(competitor["first_round_seconds"]),
                _spread(competitor["seconds_to_first_round"]),
                f"{competitor['peak_memory'][competitor['core_split']] / 1e6:.0f}",
                "-" if per_worker is None else f"{per_worker / 1e6:.0f}",
                *(f"{competitor['trainings'][training]['error']:.1e}" for training in TRAININGS),
            ]
        )
    caption = (
        "To first round: from the start of the command. Memory: sampled proportional set size of all processes "
        "together. Error: distance of the final adapter from the reference's, relative to the change in training."
    )
    return DataTable(header, rows, caption, f"{name}: cost")


def _scaling(name: str, scaling: BenchFacts) -> DataTable:
    rows = [
        [clients, _spread([1e3 * value for value in seconds]), f"{scaling['peak_memory'][clients] / 1e6:.0f}"]
        for clients, seconds in scaling["seconds_per_client"].items()
    ]
    caption = (
        "copra-fl engine in process. Between the last two rows, each additional client takes "
        f"{scaling['memory_per_extra_client'] / 1e3:.0f} kB; its adapter has {scaling['adapter_bytes'] / 1e3:.0f} kB."
    )
    return DataTable(["clients", "ms per client and round", "peak MB"], rows, caption, f"{name}: more clients")


def _schedule(name: str, savings: BenchFacts) -> DataTable:
    rows = [
        [
            f"{point['p']:g}",
            f"{point['t']:.3f}",
            f"{expected_blocks(point['p'], savings['layers']):.2f}",
            f"{mean(point['blocks']):.2f}",
            f"{point['expected']:.1%}",
            f"{mean(point['counted']):.1%}",
            _percent(point["measured"]),
        ]
        for point in savings["points"]
    ]
    blocks = mean_expected_blocks(savings["ramp"], savings["layers"])
    whole = [f"{savings['expected']:.1%}", f"{mean(savings['counted']):.1%}", _percent(savings["measured"])]
    rows.append(["whole schedule", "0 - 1", f"{blocks:.2f}", "", *whole])
    caption = (
        "Share of a LoRA step that a CopRA step saves. Closed form: E[K] blocks below the lowest active adapter, each "
        f"with {savings['block_share']:.1%} of a LoRA step's FLOPs in its backward pass (copra_fl/bench/steps.py has "
        "the model). Counted: FLOPs for the drawn masks. Measured: seconds of a step of all clients with the copra-fl "
        f"engine, {savings['core_split']}: median (minimum - maximum) of {len(savings['measured'])} passes, each with "
        f"its own masks. A LoRA step took {_spread(savings['lora_seconds'])} s."
    )
    header = ["p", "t", "E[K]", "K drawn", "closed form", "counted", "measured"]
    return DataTable(header, rows, caption, f"{name}: savings of CopRA over its schedule")


def targets(facts: BenchFacts) -> DataTable:
    """Return the table of all measured targets, with the verdict in the last column."""
    rows = [
        [check.subject, check.target, check.measured, "met" if check.met else "NOT met"]
        for check in _target_checks(facts)
    ]
    caption = f"Only of measured sizes. Ratios are of medians within this run. {machine(facts)}."
    return DataTable(["subject", "target", "measured", "verdict"], rows, caption, "Targets")


def has_targets(name: str, size: BenchFacts) -> bool:
    """Return False for the smoke size and for a size with fewer clients than it is defined with."""
    return name != "smoke" and size["size"]["clients"] == SIZES[name].clients


@dataclass(frozen=True)
class TargetCheck:
    """A measured target, its values formatted for tables."""

    subject: str
    target: str
    measured: str
    met: bool


def _target_checks(facts: BenchFacts) -> Iterator[TargetCheck]:
    sizes = {name: size for name, size in facts["sizes"].items() if has_targets(name, size)}
    for name, letter_with_target, rival, *factors in RATIOS:
        competitors = sizes[name]["competitors"] if name in sizes else {}
        letter = "g" if letter_with_target == "e" and "e" not in competitors else letter_with_target
        if letter not in competitors or rival not in competitors:
            continue
        for training, factor in zip(TRAININGS, factors, strict=True):
            reached = ratio(competitors, letter, rival, training)
            subject = f"{name}, {training}: clients/s of ({letter}) in {competitors[letter]['dtype']} / ({rival})"
            yield TargetCheck(subject, f">= {factor:g}", f"{reached:.2f}", reached >= factor)
    for name, smallest in COPRA_RATIOS.items():
        competitors = sizes[name]["competitors"] if name in sizes else {}
        if letter := next((letter for letter in "ge" if letter in competitors), None):
            reached = copra_ratio(competitors[letter])
            subject = f"{name}: clients/s of CopRA / LoRA, ({letter})"
            yield TargetCheck(subject, f">= {smallest:g}", f"{reached:.2f}", reached >= smallest)
    for letter, smallest_share in RATES:
        if competitor := sizes.get("compute", {}).get("competitors", {}).get(letter):
            share = median(competitor["trainings"]["lora"]["share_of_matmul_rate"])
            subject = f"compute, lora: share of the matmul rate in {competitor['dtype']}, ({letter})"
            yield TargetCheck(subject, f">= {smallest_share:.0%}", f"{share:.0%}", share >= smallest_share)
    for name, size in sizes.items():
        if "scaling" in size:
            yield from _scaling_checks(name, size["scaling"])
        per_worker = size["competitors"].get("e", {}).get("memory_per_extra_worker")
        if per_worker is not None:
            subject, target = f"{name}: memory of a second worker, (e)", f"<= {WORKER_BYTES / 1e6:.0f} MB"
            yield TargetCheck(subject, target, f"{per_worker / 1e6:.0f} MB", per_worker <= WORKER_BYTES)
        if "simulate_first_round" in size:
            seconds = median(size["simulate_first_round"])
            subject = f"{name}: copra-fl simulate, from the command to the end of the first round"
            met = seconds <= FIRST_ROUND_SECONDS
            yield TargetCheck(subject, f"<= {FIRST_ROUND_SECONDS:g} s", f"{seconds:.1f} s", met)


def _scaling_checks(name: str, scaling: BenchFacts) -> Iterator[TargetCheck]:
    costs = [median(seconds) for seconds in scaling["seconds_per_client"].values()]
    spread = max(costs) / min(costs) - 1
    subject = f"{name}: spread of the cost per client, {', '.join(scaling['seconds_per_client'])} clients"
    yield TargetCheck(subject, f"<= {FLAT:.0%}", f"{spread:.0%}", spread <= FLAT)
    num_adapters = scaling["memory_per_extra_client"] / scaling["adapter_bytes"]
    subject, target = f"{name}: memory of an additional client", f"<= {ADAPTERS:g} adapters"
    yield TargetCheck(subject, target, f"{num_adapters:.2f}", num_adapters <= ADAPTERS)


def ratio(competitors: BenchFacts, letter: str, rival: str, training: str) -> float:
    """Return the median clients per second of one competitor, divided by those of a rival."""
    medians = [median(competitors[name]["trainings"][training]["clients_per_second"]) for name in (letter, rival)]
    return medians[0] / medians[1]


def copra_ratio(competitor: BenchFacts) -> float:
    """Return the median clients per second of CopRA, divided by those of LoRA."""
    copra, lora = (median(competitor["trainings"][training]["clients_per_second"]) for training in ("copra", "lora"))
    return copra / lora


def _spread(values: Sequence[float]) -> str:
    """Return median, minimum and maximum."""
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def _percent(values: Sequence[float]) -> str:
    """Return median, minimum and maximum of shares in percent."""
    return f"{median(values):.1%} ({min(values):.1%} - {max(values):.1%})"
