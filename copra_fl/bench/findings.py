"""Results of a benchmark as plain data, as tables for people, and held against the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from copra_fl.adapters.state import Adapter
from copra_fl.bench.contest import Result
from copra_fl.bench.sizes import SIZES, STEADY_ROUNDS, TRAININGS, Workload
from copra_fl.bench.steps import expected_blocks, mean_expected_blocks
from copra_fl.bench.workers import Run

#: plain data, as it is written to JSON
Facts = dict[str, Any]

#: size, contestant (g where e did not run), rival, factor for LoRA, factor for CopRA
RATIOS = [
    ("overhead", "e", "b", 8.0, 8.0),
    ("overhead", "e", "c", 4.0, 4.0),
    ("small", "e", "b", 3.0, 3.0),
    ("small", "e", "c", 3.0, 3.0),
    ("compute", "e", "c", 2.0, 2.3),
    ("compute", "f", "c", 1.1, 1.2),
]
#: contestant, share of the matmul rate, of the compute size's LoRA training
RATES = [("f", 0.8), ("g", 0.6)]
FLAT, ADAPTERS, WORKER_BYTES, FIRST_ROUND_SECONDS = 0.15, 3.0, 400e6, 15.0


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{body}\n\n{self.note}\n"


def contestant_facts(result: Result) -> Facts:
    """What one contestant did at one size; a list has one value a repeat."""
    clients, rate = result.config.data.num_clients, result.matmul_rate
    trainings = {}
    for training in TRAININGS:
        rounds = [each for run in result.runs for each in run.rounds[training]]
        trainings[training] = {
            "clients_per_second": [clients * STEADY_ROUNDS / run.seconds(training) for run in result.runs],
            "cpu_seconds_per_round": [run.cpu_seconds[training] / STEADY_ROUNDS for run in result.runs],
            "share_of_matmul_rate": [result.flops[training] / run.seconds(training) / rate for run in result.runs],
            "bytes_down_per_round": mean(each.bytes_down for each in rounds),
            "bytes_up_per_round": mean(each.bytes_up for each in rounds),
            "flops": result.flops[training],
            "error": result.errors[training],
        }
    return {
        "name": result.contestant.name,
        "dtype": result.config.model.dtype,
        "attention": result.config.model.attention,
        "division": str(result.share),
        "trainings": trainings,
        "first_round_seconds": [run.first_round for run in result.runs],
        "seconds_to_first_round": [run.to_first_round for run in result.runs],
        "seconds_tried": {str(share): run.steady_seconds for share, run in result.trials.items()},
        "peak_memory": {str(share): run.peak_memory for share, run in result.trials.items()},
        "memory_per_extra_worker": _per_worker(result),
        "matmul_rate": rate,
    }


def _per_worker(result: Result) -> float | None:
    """Bytes that each worker beyond the first takes."""
    peaks = sorted((share.workers, run.peak_memory) for share, run in result.trials.items())
    (fewest, low), (most, high) = peaks[0], peaks[-1]
    return (high - low) / (most - fewest) if most > fewest else None


def scaling_facts(runs: Mapping[int, Sequence[Run]], adapter: Adapter) -> Facts:
    """Cost of a client and memory of our engine in process, with more and more clients."""
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


def size_facts(workload: Workload, results: Iterable[Result]) -> Facts:
    contestants = {result.contestant.letter: contestant_facts(result) for result in results}
    return {"size": asdict(workload.size), "model": Path(workload.model).name, "contestants": contestants}


def machine(facts: Facts) -> str:
    """Where it was measured, to stand beside every number."""
    where = facts["machine"]
    processors = [where[key] for key in ("gpu", "processor") if key in where]
    return f"{', '.join(processors)}, {where['cores']} cores"


def tables(facts: Facts) -> list[Table]:
    """Everything worth reading: who competed, the tables of each size, and the targets, if any was measured."""
    found = [contestants(facts)]
    for name in facts["sizes"]:
        found += size_tables(facts, name)
    verdicts = targets(facts)
    return [*found, verdicts] if verdicts.rows else found


def size_tables(facts: Facts, name: str) -> list[Table]:
    """Of one size: speed, work and cost; growth and what CopRA saves over its schedule, where they were measured."""
    size = facts["sizes"][name]
    found = [_speed(name, size), _work(name, size), _cost(name, size)]
    if "scaling" in size:
        found.append(_scaling(name, size["scaling"]))
    if "schedule" in size:
        found.append(_schedule(name, size["schedule"]))
    return [replace(table, note=f"{table.note} {machine(facts)}.") for table in found]


def contestants(facts: Facts) -> Table:
    competed = {
        letter: [f"({letter})", each["name"], f"{each['dtype']}, {each['attention']}"]
        for size in facts["sizes"].values()
        for letter, each in size["contestants"].items()
    }
    return Table("Contestants", ["", "contestant", "base"], list(competed.values()))


def _speed(name: str, size: Facts) -> Table:
    contestants, facts = size["contestants"], size["size"]
    rivals = [letter for letter in "bc" if letter in contestants]
    columns, rows = ["", "cores"], []
    for training in TRAININGS:
        columns += [f"{training}: clients/s", *(f"/ ({rival})" for rival in rivals)]
    for letter, each in contestants.items():
        row = [f"({letter})", each["division"]]
        for training in TRAININGS:
            ratios = [f"{ratio(contestants, letter, rival, training):.2f}" for rival in rivals]
            row += [_spread(each["trainings"][training]["clients_per_second"]), *ratios]
        rows.append(row)
    title = (
        f"{name}: {facts['clients']} clients, {facts['base']}, {facts['batch_size']} x {facts['tokens']} tokens, "
        f"{facts['local_steps']} local steps"
    )
    note = (
        f"Clients by the seconds of all {STEADY_ROUNDS} steady rounds: median (minimum - maximum) over repeats. "
        "Cores: workers x threads, the faster of the divisions tried."
    )
    return Table(title, columns, rows, note)


def _work(name: str, size: Facts) -> Table:
    columns, rows = [""], []
    for training in TRAININGS:
        columns += [f"{training}: CPU s", "of matmul rate", "kB down", "kB up"]
    for letter, each in size["contestants"].items():
        row = [f"({letter})"]
        for training in TRAININGS:
            facts = each["trainings"][training]
            row += [f"{median(facts['cpu_seconds_per_round']):.2f}", f"{median(facts['share_of_matmul_rate']):.0%}"]
            row += [f"{facts[way] / 1e3:.0f}" for way in ("bytes_down_per_round", "bytes_up_per_round")]
        rows.append(row)
    note = (
        "A round. CPU seconds of all processes of the contestant, in process of the workers alone. Matmul rate: "
        "floating point operations that the training needs (copra_fl/bench/flops.py), by what large matrix products "
        "in the same dtype and division of the cores would do in the round's seconds."
    )
    return Table(f"{name}: work", columns, rows, note)


def _cost(name: str, size: Facts) -> Table:
    columns = ["", "first round s", "to first round s", "peak MB", "an extra worker MB", "error: lora", "copra"]
    rows = []
    for letter, each in size["contestants"].items():
        per_worker = each["memory_per_extra_worker"]
        rows.append(
            [
                f"({letter})",
                _spread(each["first_round_seconds"]),
                _spread(each["seconds_to_first_round"]),
                f"{each['peak_memory'][each['division']] / 1e6:.0f}",
                "-" if per_worker is None else f"{per_worker / 1e6:.0f}",
                *(f"{each['trainings'][training]['error']:.1e}" for training in TRAININGS),
            ]
        )
    note = (
        "Memory: proportional set size of all processes together, sampled. Error: how far the final adapter is from "
        "the reference's, by the change in training."
    )
    return Table(f"{name}: cost", columns, rows, note)


def _scaling(name: str, scaling: Facts) -> Table:
    rows = [
        [clients, _spread([1e3 * value for value in seconds]), f"{scaling['peak_memory'][clients] / 1e6:.0f}"]
        for clients, seconds in scaling["seconds_per_client"].items()
    ]
    note = (
        f"Our engine in process. From the last but one to the last row a client takes "
        f"{scaling['memory_per_extra_client'] / 1e3:.0f} kB; its adapter has {scaling['adapter_bytes'] / 1e3:.0f} kB."
    )
    return Table(f"{name}: more clients", ["clients", "ms a client and round", "peak MB"], rows, note)


def _schedule(name: str, savings: Facts) -> Table:
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
    note = (
        "Share of a LoRA step that a CopRA step saves. In closed form: E[K] blocks below the lowest active adapter, "
        f"each with {savings['block_share']:.1%} of a LoRA step's FLOPs in its backward pass (bench/steps.py has the "
        "model). Counted: FLOPs, of the masks drawn. Measured: seconds of a step of all clients of our engine, "
        f"{savings['division']}: median (minimum - maximum) of {len(savings['measured'])} passes with masks of their "
        f"own. A LoRA step took {_spread(savings['lora_seconds'])} s."
    )
    columns = ["p", "t", "E[K]", "K drawn", "closed form", "counted", "measured"]
    return Table(f"{name}: what CopRA saves of a step over its schedule", columns, rows, note)


def targets(facts: Facts) -> Table:
    """Each target that was measured, with its verdict in the last column."""
    rows = [[what, wanted, shown, "met" if met else "NOT met"] for what, wanted, shown, met in _checked_targets(facts)]
    note = f"Of the sizes that ran. Ratios are of medians, within this run. {machine(facts)}."
    return Table("Targets", ["target", "wanted", "measured", ""], rows, note)


def has_targets(name: str, size: Facts) -> bool:
    """The smoke size has none, nor has a size with fewer clients than it is defined with."""
    return name != "smoke" and size["size"]["clients"] == SIZES[name].clients


def _checked_targets(facts: Facts) -> Iterable[tuple[str, str, str, bool]]:
    """Each target that was measured: what, wanted, measured, whether it is met."""
    sizes = {name: size for name, size in facts["sizes"].items() if has_targets(name, size)}
    for name, ours, rival, *factors in RATIOS:
        contestants = sizes[name]["contestants"] if name in sizes else {}
        letter = "g" if ours == "e" and "e" not in contestants else ours
        if letter not in contestants or rival not in contestants:
            continue
        for training, factor in zip(TRAININGS, factors, strict=True):
            reached = ratio(contestants, letter, rival, training)
            what = f"{name}, {training}: clients/s of ({letter}) in {contestants[letter]['dtype']} / ({rival})"
            yield what, f">= {factor:g}", f"{reached:.2f}", reached >= factor
    for letter, least in RATES:
        if contestant := sizes.get("compute", {}).get("contestants", {}).get(letter):
            share = median(contestant["trainings"]["lora"]["share_of_matmul_rate"])
            what = f"compute, lora: matmul rate of {contestant['dtype']} that ({letter}) reaches"
            yield what, f">= {least:.0%}", f"{share:.0%}", share >= least
    for name, size in sizes.items():
        if "scaling" in size:
            scaling = size["scaling"]
            costs = [median(seconds) for seconds in scaling["seconds_per_client"].values()]
            spread, grown = max(costs) / min(costs) - 1, scaling["memory_per_extra_client"] / scaling["adapter_bytes"]
            counts = ", ".join(scaling["seconds_per_client"])
            yield (
                f"{name}: spread of the cost a client, {counts} clients",
                f"<= {FLAT:.0%}",
                f"{spread:.0%}",
                (spread <= FLAT),
            )
            yield f"{name}: memory of an extra client", f"<= {ADAPTERS:g} adapters", f"{grown:.2f}", grown <= ADAPTERS
        per_worker = size["contestants"].get("e", {}).get("memory_per_extra_worker")
        if per_worker is not None:
            shown = f"{per_worker / 1e6:.0f} MB"
            yield (
                f"{name}: memory of a second worker (e)",
                f"<= {WORKER_BYTES / 1e6:.0f} MB",
                shown,
                (per_worker <= WORKER_BYTES),
            )
        if "simulate_first_round" in size:
            seconds = median(size["simulate_first_round"])
            yield (
                f"{name}: copra-fl simulate, command to first finished round",
                f"<= {FIRST_ROUND_SECONDS:g} s",
                (f"{seconds:.1f} s"),
                seconds <= FIRST_ROUND_SECONDS,
            )


def ratio(contestants: Facts, letter: str, other: str, training: str) -> float:
    """Clients per second of one contestant by those of another, medians."""
    ours, theirs = (median(contestants[each]["trainings"][training]["clients_per_second"]) for each in (letter, other))
    return ours / theirs


def _spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum."""
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def _percent(values: Sequence[float]) -> str:
    """The same of shares."""
    return f"{median(values):.1%} ({min(values):.1%} - {max(values):.1%})"
