"""What a benchmark found in short: plain numbers for programs, and what it did not measure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from copra_fl.bench.contest import CONTESTANTS
from copra_fl.bench.findings import Facts, machine
from copra_fl.bench.sizes import SIZES, TRAININGS

#: letter of a contestant -> its name in the summary
NAMES = {
    "a": "naive",
    "b": "tuned",
    "c": "loop",
    "d": "node",
    "e": "cohort",
    "f": "engine_float32",
    "g": "engine",
}
#: the sizes that have targets, and so are in every summary
MEASURED = ("overhead", "small", "compute")
#: as many as it takes for a median with a spread
FULL_REPEATS = 5


def summary(facts: Facts) -> dict[str, Any]:
    """Medians over repeats, by size and contestant (`NAMES`). What did not run is null; sizes and names are all there.

    `overhead` and `small`: clients per second of LoRA training; `compute`: of `lora` and of `copra`. `matmul_share`:
    share of the matmul rate, of LoRA training. `memory`, in bytes: `peak` and `extra_worker` of each contestant,
    `extra_client` of our engine in process. `saved`, from size compute: share of a LoRA step that CopRA saves over its
    schedule, `measured` and in `closed_form`. The smoke size is there where it ran, as `overhead`.
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


def left_out(facts: Facts) -> Iterator[str]:
    """A sentence for each thing that the whole benchmark measures and this run did not."""
    sizes = facts["sizes"]
    if missing := [name for name in MEASURED if name not in sizes]:
        yield f"Not measured: size {', '.join(missing)}."
    without: dict[str, list[str]] = {}
    for name, size in sizes.items():
        absent = [str(each) for each in CONTESTANTS if each.letter not in size["contestants"]]
        without.setdefault(", ".join(absent), []).append(name)
    yield from (f"Without {absent}: {', '.join(names)}." for absent, names in without.items() if absent)
    clients = {name: size["size"]["clients"] for name, size in sizes.items()}
    if fewer := [
        f"{name} with {number} of {SIZES[name].clients} clients"
        for name, number in clients.items()
        if number < SIZES[name].clients
    ]:
        yield f"No verdict on targets: {', '.join(fewer)}."
    if undivided := [name for name, size in sizes.items() if not size["size"].get("divided", True)]:
        yield f"In one division of the cores alone, which may not be the fastest: {', '.join(undivided)}."
    if facts["repeats"] < FULL_REPEATS:
        yield f"{facts['repeats']} of {FULL_REPEATS} repeats."


def _by_name(size: Facts, training: str, number: str) -> dict[str, float | None]:
    found = size.get("contestants", {})
    return {
        name: median(found[letter]["trainings"][training][number]) if letter in found else None
        for letter, name in NAMES.items()
    }


def _memory(size: Facts) -> dict[str, Any]:
    found = {letter: size.get("contestants", {}).get(letter) for letter in NAMES}
    return {
        "peak": {NAMES[letter]: each and each["peak_memory"][each["division"]] for letter, each in found.items()},
        "extra_worker": {NAMES[letter]: each and each["memory_per_extra_worker"] for letter, each in found.items()},
        "extra_client": size.get("scaling", {}).get("memory_per_extra_client"),
    }
