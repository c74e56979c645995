"""Run folders as the server leaves them, with numbers that real runs could have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from copra_fl.config import Config
from copra_fl.reporting.report import sections
from copra_fl.reporting.results import load_comparison
from copra_fl.reporting.statistics import summarize

LAYERS = [f"encoder.layer.{index}" for index in range(6)]
MODULES = [f"{layer}.attention.self.{name}" for layer in LAYERS for name in ("query", "value")]
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


def goals(method: str) -> list[float]:
    """Test accuracy with each seed."""
    spread = np.random.default_rng(list(method.encode())).normal(0, [0.03, 0.004, 0.004, 0.004])
    return ACCURACY.get(method, list(0.38 + spread[0] + spread[1:]))


def write_run(folder: Path, method: str, seed: int, num_rounds: int = 3, finished: bool = True, **changes: Any) -> None:
    """A run folder as the server leaves it: 8 clients, 6 layers, numbers that a real run could have."""
    folder.mkdir(parents=True)
    rule, _, training = (f"fedavg+{method}" if method in ("lora", "copra") else f"{method}+lora").partition("+")
    training = training.removesuffix("+lora")
    error, up, down = RULES.get(rule, (0.2, 1, 1))
    personal = error is None
    settings = {"rule": rule, "local_training": training, "seed": seed, "num_rounds": num_rounds, "num_clients": 8}
    config = Config().changed(**settings, **changes)
    (folder / "config.toml").write_text(config.to_toml())
    provenance = {
        "versions": {"copra-fl": "0.1.0", "flwr": "1.42.0", "torch": "2.13.0+cpu"},
        "source_digest": "5f1e" * 16,
        "seeds": {"root": seed},
        "assets": {"minilm": "0a" * 32, "health-tweets": "1b" * 32},
        "machine": {"cpus": 2, "system": "Linux", "python": "3.11.7"},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    rng = np.random.default_rng([seed, len(method)])
    goal = goals(method)[seed]
    steps = 150
    journal: list[dict[str, Any]] = []
    for number in range(1, num_rounds + 1):
        times = (number - 1 + (np.arange(steps) + 0.5) / steps) / num_rounds
        p = np.ones(steps) if training == "lora" else np.minimum(1, times / 0.75)
        accuracy = goal - 0.2 * 0.4**number
        journal.append(
            {
                "round": number,
                "seconds": 21.5 + rng.normal(),
                "bytes_up": round(up * 8 * 463_132),
                "bytes_down": round(down * 8 * 463_132),
                "train_loss": 2.6 - 0.3 * number,
                "clients": [
                    {
                        "client": client,
                        "examples": int(1500 / (client + 1.5 + seed)),
                        "steps": steps,
                        "loss": 2.6 - 0.3 * number + 0.1 * rng.normal(),
                        "seconds": 4.0,
                        "active_steps": [int((rng.random(steps) < p).sum()) for _ in LAYERS],
                    }
                    for client in range(8)
                    if (seed, number, client) != (1, 2, 5)
                ],
                "missing": [{"client": 5, "reason": "loss is not finite"}] if (seed, number) == (1, 2) else [],
                "layers": LAYERS,
                "aggregation_error": None,
                "notes": {"kept": [0, 3]} if rule == "connectivity" else {},
            }
        )
        if not personal:
            errors = {name: error * float(rng.uniform(0.5, 1.5)) * number for name in MODULES}
            journal[-1] |= {
                "validation": {"loss": 3.2 - 3 * accuracy, "accuracy": accuracy, "examples": 1000},
                "merge_gap": {"loss": -0.4 + 0.1 * number, "accuracy": 0.12 - 0.02 * number + 0.01 * rng.normal()},
                "aggregation_error": {"total": error * number, "layers": errors},
            }
    (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal))
    if not finished:
        return
    u = np.linspace(0, 1, 11)
    bump = 0.15 if training == "lora" else -0.1
    paths = []
    for pair in [] if personal else ([0, 1], [2, 5], [3, 7]):
        ends = 2.1 + 0.2 * rng.random(2)
        loss = (1 - u) * ends[0] + u * ends[1] + 4 * bump * u * (1 - u)
        accuracy = goal - 0.2 * (loss - loss.min())
        paths.append(
            {
                "clients": pair,
                "u": u.tolist(),
                "loss": loss.tolist(),
                "accuracy": accuracy.tolist(),
                "barrier_entezari": float(np.max(loss - (1 - u) * loss[0] - u * loss[-1])),
                "barrier_frankle": float(loss.max() - (loss[0] + loss[-1]) / 2),
                "midpoint_gap": float(accuracy[5] - (accuracy[0] + accuracy[-1]) / 2),
            }
        )
    summary = {
        "method": method,
        "rule": rule,
        "seed": seed,
        "rounds": num_rounds,
        "personal": personal,
        "test": None if personal else {"loss": 3.2 - 3 * goal, "accuracy": goal, "examples": 2000},
        "validation": journal[-1].get("validation"),
        "merge_gap": journal[-1].get("merge_gap"),
        "aggregation_error": None if personal else error * (num_rounds + 1) / 2,
        "bytes_up": sum(row["bytes_up"] for row in journal),
        "bytes_down": sum(row["bytes_down"] for row in journal),
        "seconds": sum(row["seconds"] for row in journal) + 10,
        "clients": [
            {"client": client, "accuracy": goal + 0.1 * rng.normal(), "loss": 2.0, "examples": 100 // (client + 1)}
            for client in range(8)
        ],
        "paths": paths,
        "skipped_clients": [6] if seed == 1 else [],
        "unassigned_examples": 12,
        "dropped_empty": 1,
        "dropped_duplicates": 7,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_comparison(folder: Path, seeds: list[int], methods: list[str] | None = None) -> Path:
    """Each of `methods`, else LoRA and CopRA, with each of `seeds`."""
    methods = methods or ["lora", "copra"]
    folder.mkdir(parents=True)
    (folder / "comparison.toml").write_text(f"methods = {json.dumps(methods)}\nseeds = {seeds}\n")
    for method in methods:
        for seed in seeds:
            rate = 5e-3 if method.endswith("copra") else 2e-3
            write_run(folder / f"{method}-seed{seed}", method, seed, learning_rate=rate)
    return folder


def many_methods() -> list[str]:
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
    loaded = load_comparison(folder)
    return sum(len(section.figures) for section in sections(loaded, summarize(loaded)))
