"""Run folders as the server writes them, with numbers that real runs could have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from copra_fl.class_metrics import class_metrics
from copra_fl.config import Config
from copra_fl.records import (
    AggregationError,
    ClientEvaluation,
    ClientRecord,
    Evaluation,
    LinePath,
    MergeGap,
    MissingClient,
    Origin,
    Provenance,
    RoundRecord,
    RunSummary,
)
from copra_fl.reporting.html import Figure
from copra_fl.reporting.report import sections
from copra_fl.reporting.results import Comparison, load_comparison
from copra_fl.reporting.statistics import summarize

NUM_CLIENTS, NUM_STEPS = 8, 150
LAYERS = tuple(f"encoder.layer.{index}" for index in range(6))
MODULES = [f"{layer}.attention.self.{name}" for layer in LAYERS for name in ("query", "value")]
LABELS = ("air", "fire", "sea", "soil")
ACCURACY = {"lora": [0.40, 0.43, 0.39], "copra": [0.43, 0.45, 0.43]}
#: relative aggregation errors, bytes up and bytes down of a client and round, as multiples of LoRA's; others: 0.2, 1, 1
RULES = {
    "ffa-lora": (2e-8, 0.5, 0.5),
    "fed-sb": (3e-8, 0.01, 0.01),
    "flora": (4e-8, 1, 8),
    "fedex-lora": (1e-8, 1, 4),
    "flexlora": (0.07, 1, 1),
    "fedsa-lora": (None, 0.5, 0.5),
}


def final_accuracies(method: str) -> list[float]:
    """Return the final test accuracy of `method` with each seed."""
    spread = np.random.default_rng(list(method.encode())).normal(0, [0.03, 0.004, 0.004, 0.004])
    return ACCURACY.get(method, list(0.38 + spread[0] + spread[1:]))


def write_run(folder: Path, method: str, seed: int, num_rounds: int = 3, finished: bool = True, **changes: Any) -> None:
    """Write the folder of a run with 8 clients and 6 layers; `changes` are settings."""
    folder.mkdir(parents=True)
    rule, _, training = (f"fedavg+{method}" if method in ("lora", "copra") else f"{method}+lora").partition("+")
    training = training.removesuffix("+lora")
    settings = {"rule": rule, "local_training": training, "seed": seed, "num_rounds": num_rounds}
    config = Config().changed(**settings, num_clients=NUM_CLIENTS, **changes)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "provenance.json").write_text(provenance(seed).to_json(indent=2))
    rng = np.random.default_rng([seed, len(method)])
    accuracy = final_accuracies(method)[seed]
    journal = [
        round_record(number, num_rounds, rule, training, seed, accuracy, rng) for number in range(1, num_rounds + 1)
    ]
    (folder / "journal.jsonl").write_text("".join(record.to_json() + "\n" for record in journal))
    if finished:
        summary = run_summary(method, rule, training, seed, accuracy, journal, rng)
        (folder / "summary.json").write_text(summary.to_json(indent=2))


def provenance(seed: int) -> Provenance:
    origin = Origin(
        after_round=0,
        versions={"copra-fl": "0.1.0", "flwr": "1.42.0", "torch": "2.13.0+cpu"},
        source_digest="5f1e" * 16,
        machine={"cores": 2, "system": "Linux", "processor": "a processor"},
        engine="stacked",
        data_digest="7c" * 32,
        assets={"minilm": "0a" * 32, "health-tweets": "1b" * 32},
    )
    return Provenance(run=f"{seed:032x}", seed=seed, start=origin)


def round_record(
    number: int, num_rounds: int, rule: str, training: str, seed: int, accuracy: float, rng: np.random.Generator
) -> RoundRecord:
    """Return the record of a round; `accuracy` is reached in the end. Client 5 is missing in round 2 of seed 1."""
    error, up, down = RULES.get(rule, (0.2, 1, 1))
    times = (number - 1 + (np.arange(NUM_STEPS) + 0.5) / NUM_STEPS) / num_rounds
    p = np.ones(NUM_STEPS) if training == "lora" else np.minimum(1, times / 0.75)
    seconds = 21.5 + rng.normal()
    loss = 2.6 - 0.3 * number
    missing = 5 if (seed, number) == (1, 2) else None
    clients = tuple(
        ClientRecord(
            client=client,
            examples=int(1500 / (client + 1.5 + seed)),
            steps=NUM_STEPS,
            loss=loss + 0.1 * rng.normal(),
            seconds=4.0,
            distance=0.5,
            flops=1e12,
            active_steps=tuple(int((rng.random(NUM_STEPS) < p).sum()) for _ in LAYERS),
        )
        for client in range(NUM_CLIENTS)
        if client != missing
    )
    validation = merge_gap = aggregation_error = None
    if error is not None:
        current = accuracy - 0.2 * 0.4**number
        layers = {name: error * float(rng.uniform(0.5, 1.5)) * number for name in MODULES}
        aggregation_error = AggregationError(total=error * number, layers=layers, of_change=2 * error)
        validation = Evaluation(
            loss=3.2 - 3 * current, accuracy=current, examples=1000, metrics=class_metrics(confusion_of(current))
        )
        merge_gap = MergeGap(loss=-0.4 + 0.1 * number, accuracy=0.12 - 0.02 * number + 0.01 * rng.normal())
    return RoundRecord(
        round=number,
        seconds=seconds,
        bytes_up=round(up * NUM_CLIENTS * 463_132),
        bytes_down=round(down * NUM_CLIENTS * 463_132),
        train_loss=loss,
        layers=LAYERS,
        clients=clients,
        missing=() if missing is None else (MissingClient(client=missing, reason="loss is not finite"),),
        aggregation_error=aggregation_error,
        notes={"kept": [0, 3]} if rule == "connectivity" else {},
        validation=validation,
        merge_gap=merge_gap,
    )


def run_summary(
    method: str,
    rule: str,
    training: str,
    seed: int,
    accuracy: float,
    journal: list[RoundRecord],
    rng: np.random.Generator,
) -> RunSummary:
    errors = [record.aggregation_error.total for record in journal if record.aggregation_error]
    personal = not errors
    paths = () if personal else tuple(line_path(pair, accuracy, training, rng) for pair in ((0, 1), (2, 5), (3, 7)))
    return RunSummary(
        method=training,
        rule=rule,
        personal=personal,
        seed=seed,
        rounds=len(journal),
        test=None
        if personal
        else Evaluation(
            loss=3.2 - 3 * accuracy,
            accuracy=accuracy,
            examples=2000,
            metrics=class_metrics(confusion_of(accuracy)),
            confusion=confusion_of(accuracy),
        ),
        base_test=None if personal else Evaluation(loss=3.2, accuracy=0.1, examples=2000),
        base_validation=None if personal else Evaluation(loss=3.2, accuracy=0.12, examples=1000),
        labels=() if personal else LABELS,
        held_out=None,
        validation=journal[-1].validation,
        merge_gap=journal[-1].merge_gap,
        privacy=None,
        aggregation_error=None if personal else float(np.mean(errors)),
        bytes_up=sum(record.bytes_up for record in journal),
        bytes_down=sum(record.bytes_down for record in journal),
        seconds=sum(record.seconds for record in journal) + 10,
        clients=tuple(
            ClientEvaluation(
                client=client, accuracy=accuracy + 0.1 * rng.normal(), loss=2.0, examples=100 // (client + 1)
            )
            for client in range(NUM_CLIENTS)
        ),
        paths=paths,
        skipped_clients=(6,) if seed == 1 else (),
        unassigned_examples=12,
        dropped_duplicates=7,
        dropped_empty=1,
    )


def confusion_of(accuracy: float) -> tuple[tuple[int, ...], ...]:
    """Return the confusion of 2000 examples of `LABELS`, of which about the share `accuracy` is correct."""
    rows = []
    for label, examples in enumerate((600, 500, 500, 400)):
        correct = round(accuracy * examples)
        others = [(examples - correct) // 3] * 3
        others[0] += examples - correct - sum(others)
        rows.append((*others[:label], correct, *others[label:]))
    return tuple(rows)


def line_path(clients: tuple[int, int], goal: float, training: str, rng: np.random.Generator) -> LinePath:
    """Return a path with a parabola on the line between the ends' losses: a barrier of 0.15 for LoRA, else none."""
    u = np.linspace(0, 1, 11)
    ends = 2.1 + 0.2 * rng.random(2)
    bump = 0.15 if training == "lora" else -0.1
    loss = (1 - u) * ends[0] + u * ends[1] + 4 * bump * u * (1 - u)
    accuracy = goal - 0.2 * (loss - loss.min())
    return LinePath(
        clients=clients,
        u=tuple(u.tolist()),
        loss=tuple(loss.tolist()),
        accuracy=tuple(accuracy.tolist()),
        barrier_entezari=float(np.max(loss - (1 - u) * loss[0] - u * loss[-1])),
        barrier_frankle=float(loss.max() - (loss[0] + loss[-1]) / 2),
        midpoint_gap=float(accuracy[5] - (accuracy[0] + accuracy[-1]) / 2),
    )


def write_comparison(folder: Path, seeds: list[int], methods: list[str] | None = None) -> Path:
    """Write a comparison of `methods`, by default LoRA and CopRA, with each of `seeds`. Returns `folder`."""
    methods = methods or ["lora", "copra"]
    folder.mkdir(parents=True)
    (folder / "comparison.toml").write_text(f"methods = {json.dumps(methods)}\nseeds = {seeds}\n")
    for method in methods:
        for seed in seeds:
            rate = 5e-3 if method.endswith("copra") else 2e-3
            write_run(folder / f"{method}-seed{seed}", method, seed, learning_rate=rate)
    return folder


def many_methods() -> list[str]:
    """Return LoRA, CopRA, every other rule with each of the two, and a personal rule."""
    rules = [
        "ffa-lora",
        "rolora",
        "zero-pad",
        "hetlora",
        "flora",
        "flexlora",
        "fedex-lora",
        "lora-fair",
        "connectivity",
    ]
    rules += ["fedrot-lora", "fed-sb", "median", "trimmed-mean", "norm-clipped"]
    return ["lora", "copra", *(f"{rule}{copra}" for rule in rules for copra in ("", "+copra")), "fedsa-lora"]


def num_figures(folder: Path) -> int:
    """Return the number of figures in the report of `folder`."""
    comparison = load_comparison(folder)
    return sum(len(section.figures) for section in sections(comparison, summarize(comparison)))


def figures_by_title(comparison: Comparison) -> dict[str, Figure]:
    """Return the figures of the report, in their order."""
    arranged = sections(comparison, summarize(comparison))
    return {figure.title: figure for section in arranged for figure in section.figures}
