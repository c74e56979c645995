"""The medians of a benchmark for programs, and the parts that it left out."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from copra_fl.bench.findings import BenchFacts, machine
from copra_fl.bench.runner import COMPETITORS
from copra_fl.bench.sizes import SIZES, TRAININGS

#: letter of a competitor -> its name in the summary
NAMES = {
    "a": "naive",
    "b": "tuned",
    "c": "loop",
    "B": "tuned_our_dtype",
    "C": "loop_our_dtype",
    "d": "node",
    "e": "cohort",
    "f": "engine_float32",
    "g": "engine",
}
#: sizes with targets; they are in every summary
MEASURED = ("overhead", "small", "compute")
#: number of repeats of a full benchmark
FULL_REPEATS = 5


def summary(facts: BenchFacts) -> dict[str, Any]:
    """Return medians over repeats, by size and competitor (`NAMES`). All names are present; None means not measured.

    `overhead` and `small`: clients per second of LoRA training; `compute`: the same of `lora` and `copra`.
    `matmul_share`: share of the matmul rate that LoRA training reaches. `memory`, in bytes: `peak` and `extra_worker`
    of each competitor, `extra_client` of the engine in process. `saved`, from size compute: share of a LoRA step that
    CopRA saves over its schedule, `measured` and in `closed_form`. The smoke size, if measured, looks like `overhead`.
    """
    sizes = {name: facts["sizes"].get(name, {}) for name in dict.fromkeys([*MEASURED, *facts["sizes"]])}
    speeds = {
        name: {training: _by_name(size, training, "clients_per_second") for training in TRAININGS}
        for name, size in sizes.items()
    }
    schedule = sizes["compute"].get("schedule")
    return {
        "machine": machine(facts),
        "date": facts["date"],
        **{name: speed if name == "compute" else speed["lora"] for name, speed in speeds.items()},
        "matmul_share": {name: _by_name(size, "lora", "share_of_matmul_rate") for name, size in sizes.items()},
        "memory": {name: _memory(size) for name, size in sizes.items()},
        "saved": {
            "measured": median(schedule["measured"]) if schedule else None,
            "closed_form": schedule["expected"] if schedule else None,
        },
        "left_out": list(left_out(facts)),
    }


def left_out(facts: BenchFacts) -> Iterator[str]:
    """Yield a sentence for each part of the full benchmark that a run did not measure."""
    sizes = facts["sizes"]
    if missing := [name for name in MEASURED if name not in sizes]:
        yield f"Not measured: size {', '.join(missing)}."
    sizes_by_absent: dict[str, list[str]] = {}
    for name, size in sizes.items():
        absent = [str(competitor) for competitor in COMPETITORS if competitor.letter not in size["competitors"]]
        sizes_by_absent.setdefault(", ".join(absent), []).append(name)
    yield from (f"Without {absent}: {', '.join(names)}." for absent, names in sizes_by_absent.items() if absent)
    clients = {name: size["size"]["clients"] for name, size in sizes.items()}
    if fewer := [
        f"{name} with {number} of {SIZES[name].clients} clients"
        for name, number in clients.items()
        if number < SIZES[name].clients
    ]:
        yield f"No verdict on targets, because of fewer clients: {', '.join(fewer)}."
    if one_split := [name for name, size in sizes.items() if not size["size"].get("all_core_splits", True)]:
        yield f"Only one split of the cores was tried, which may not be the fastest: {', '.join(one_split)}."
    if facts["repeats"] < FULL_REPEATS:
        yield f"{facts['repeats']} of {FULL_REPEATS} repeats."


def _by_name(size: BenchFacts, training: str, number: str) -> dict[str, float | None]:
    competitors = size.get("competitors", {})
    return {
        name: median(competitors[letter]["trainings"][training][number]) if letter in competitors else None
        for letter, name in NAMES.items()
    }


def _memory(size: BenchFacts) -> dict[str, Any]:
    facts_by_name = {name: size.get("competitors", {}).get(letter) for letter, name in NAMES.items()}
    return {
        "peak": {name: facts and facts["peak_memory"][facts["core_split"]] for name, facts in facts_by_name.items()},
        "extra_worker": {name: facts and facts["memory_per_extra_worker"] for name, facts in facts_by_name.items()},
        "extra_client": size.get("scaling", {}).get("memory_per_extra_client"),
    }
