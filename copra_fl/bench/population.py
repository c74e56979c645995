"""Size ``clients``: time and memory of a federation by phase, from 100 to 100,000 clients; 1 % train in a round.

The base is tiny (BERT of 1 layer, 32 wide), and each client trains one step of 4 x 8 tokens, so that what is left is
the cost of a client itself: its example counts in the handshake, its place in the sample, its message, its line in the
journal. `experiments/bench/phases.py` runs server and nodes in one process, without Flower's and Ray's own processes,
and times each phase. A phase may grow as fast as the number of clients, and not faster (`GROWTH`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from copra_fl.bench.findings import BenchFacts, machine
from copra_fl.bench.sizes import SPECIAL, VOCABULARY, made_once, write_base
from copra_fl.config import Config, Value
from copra_fl.reporting.data_table import NO_VALUE, DataTable
from copra_fl.seeding import generator
from copra_fl.simulation.superlink import RunFailed, app_directory
from copra_fl.wording import join_words

POPULATIONS = (100, 1_000, 10_000, 100_000)
#: share of the clients in a round, and rounds; the first round is not timed
SHARE, ROUNDS = 0.01, 4
NODES = 2
#: examples of each client, of which one is a validation example; held-out examples of each kind
EXAMPLES, HELD_OUT = 2, 20
BATCH_SIZE, TOKENS = 4, 8
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
#: phases whose work is in every round; all others happen once in a run
PER_ROUND = ("sampling and placement", "training", "aggregation", "checkpoint and journal")
#: a phase of less than so many seconds is not judged
NEGLIGIBLE = 0.1
#: target: with ten times as many clients a phase takes at most so many times as long
GROWTH = 11.0


def measure(populations: Sequence[int], announce: Callable[[str], None]) -> BenchFacts:
    """Run a federation of each number of clients; return its times by phase, its memory and the sizes of its files.

    Raises RunFailed.
    """
    model = made_once("random-bert-32x1", partial(write_base, shape=SHAPE))
    facts = {}
    for clients in populations:
        announce(f"{clients:,} clients")
        texts = made_once(f"clients-{clients}.jsonl", partial(write_texts, clients=clients))
        with tempfile.TemporaryDirectory(prefix="copra-fl-bench-") as name:
            folder = Path(name)
            (folder / "recipe.toml").write_text(make_config(clients, model, texts).to_toml(), "utf-8")
            arguments = [str(folder / "recipe.toml"), str(folder), str(NODES)]
            command = [sys.executable, "-m", "experiments.bench.phases", *arguments]
            environment = os.environ | {"COPRA_FL_CACHE": str(folder / "cache")}  # so that the data are encoded
            result = subprocess.run(command, cwd=app_directory(), env=environment, capture_output=True, text=True)
            if result.returncode:
                raise RunFailed(f"the federation of {clients} clients failed: {result.stderr}")
            facts[str(clients)] = json.loads((folder / "phases.json").read_text("utf-8"))
    return facts


def make_config(clients: int, model: Path, texts: Path) -> Config:
    """Return the configuration of a federation of so many clients."""
    flat: dict[str, Value] = {
        "model": str(model),
        "dataset": str(texts),
        "partitioner": "natural",
        "client-column": "client",
        "num-clients": clients,
        "validation-fraction": 1 / EXAMPLES,
        "server-validation-examples": HELD_OUT,
        "test-examples": HELD_OUT,
        "max-length": TOKENS,
        "rank": 2,
        "batch-size": BATCH_SIZE,
        "local-steps": 1,
        "num-rounds": ROUNDS,
        "fraction-clients": SHARE,
        "merge-gap-clients": 0,
        "path-pairs": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    return Config.from_flat(flat)


def write_texts(path: Path, clients: int) -> None:
    """Write a file of random texts with the client of each."""
    number = clients * EXAMPLES + 2 * HELD_OUT
    words = generator(0, "bench", "clients").choice(VOCABULARY[len(SPECIAL) :], (number, TOKENS))
    with path.open("w", encoding="utf-8") as file:
        for row, text in enumerate(words):
            file.write(json.dumps({"text": " ".join(text), "label": row % 4, "client": row % clients}) + "\n")


def seconds(of_population: BenchFacts, phase: str) -> float:
    """Return the CPU seconds of a phase: the median over rounds without the first, or those of its only time."""
    measured = of_population["cpu_seconds"][phase]
    return float(median(measured[1:] if phase in PER_ROUND else measured))


def growth(facts: BenchFacts, phase: str) -> float | None:
    """Return the factor by which a phase grows between the two largest populations, for each ten times more clients.

    None with one population, and if the phase is negligible.
    """
    counts = sorted(map(int, facts))
    if len(counts) < 2:
        return None
    before, after = (seconds(facts[str(clients)], phase) for clients in counts[-2:])
    return after / before * 10 * counts[-2] / counts[-1] if after > NEGLIGIBLE else None


def tables(facts: BenchFacts) -> list[DataTable]:
    """Return the tables of seconds by phase, and of memory and files; empty without this size."""
    populations: BenchFacts = facts.get("clients", {})
    if not populations:
        return []
    counts = sorted(populations, key=int)
    heading = [f"{int(clients):,} clients" for clients in counts]
    rows = []
    for phase in populations[counts[0]]["seconds"]:
        factor = growth(populations, phase)
        shown = [f"{seconds(populations[clients], phase):.3g}" for clients in counts]
        verdict = NO_VALUE if factor is None else f"{factor:.1f}"
        rows.append([phase, "round" if phase in PER_ROUND else "run", *shown, verdict])
    faster = [phase for phase, factor in _growths(populations).items() if factor > GROWTH]
    caption = (
        f"CPU seconds of one thread. Each round samples {SHARE:.0%} of the clients; {NODES} nodes in the server's "
        f"process. Of a round: medians of {ROUNDS - 1} rounds. Growth: with ten times as many clients, between the "
        f"last two columns; up to {GROWTH:g} is as fast as the number of clients. Phases below {NEGLIGIBLE:g} s are "
        "not judged. "
        f"{_verdict(faster) if len(counts) > 1 else ''}{machine(facts)}."
    )
    times = DataTable(["phase", "once per", *heading, "growth"], rows, caption, "clients: seconds by phase")
    memory = [
        ["peak memory, MB", *(f"{max(populations[c]['peak_memory'].values()) / 1e6:.0f}" for c in counts)],
        ["line of the journal, kB", *(_kilobytes(populations[c], "journal.jsonl", ROUNDS) for c in counts)],
        ["summary.json, kB", *(_kilobytes(populations[c], "summary.json") for c in counts)],
        ["report.html, kB", *(_kilobytes(populations[c], "report.html") for c in counts)],
    ]
    caption = f"Memory of the one process with server, nodes, data and Python. {machine(facts)}."
    return [times, DataTable(["", *heading], memory, caption, "clients: memory and files")]


def _growths(populations: BenchFacts) -> dict[str, float]:
    """Return the growth of each phase that is not negligible."""
    phases = next(iter(populations.values()))["seconds"]
    return {phase: factor for phase in phases if (factor := growth(populations, phase)) is not None}


def _verdict(faster: Sequence[str]) -> str:
    if not faster:
        return "No phase grows faster than the number of clients. "
    return f"Faster than the number of clients: {join_words(faster)}. "


def _kilobytes(of_population: BenchFacts, name: str, parts: int = 1) -> str:
    return f"{of_population['file_bytes'][name] / parts / 1e3:,.1f}"


def merged(results: Sequence[Mapping[str, Any]]) -> BenchFacts:
    """Return the facts of several runs of this size on one machine as those of one; later runs count."""
    return {**results[-1], "clients": {n: of for facts in results for n, of in facts.get("clients", {}).items()}}
