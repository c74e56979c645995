"""Looks at a Ray cluster, machine by machine: what it has, and what lies there. A process of its own, as Ray is large.

    python -P ray_look.py < QUESTION > ANSWER

Both are JSON. The question: `address`; `variables` of the workers' environment; `paths` that are wanted; `mark`, the
name of a file in the asker's cache. The answer: `machines`, `free_cpus` and `free_gpus` of all; or `error`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

#: for the workers of a run that was just killed to go
WAIT_SECONDS = 20


def look(paths: list[str], mark: str) -> dict[str, Any]:
    """What is to be known of the machine that this runs on."""
    from pathlib import Path

    try:
        from copra_fl import files, provenance
    except ImportError as error:
        return {"error": str(error)}
    return {
        "digest": provenance.source_digest(Path(provenance.__file__).parent),
        "versions": provenance.versions(),
        "missing": [path for path in paths if not Path(path).exists()],
        "shares_cache": (files.cache_dir() / mark).exists(),
    }


def machines(paths: list[str], mark: str) -> list[dict[str, Any]]:
    """Those that can train: address, cores, GPUs, and what `look` finds there."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    found = [
        ray.remote(look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(paths, mark)
        for node in nodes
    ]
    return [
        {
            "address": node["NodeManagerAddress"],
            "cpus": node["Resources"]["CPU"],
            "gpus": node["Resources"].get("GPU", 0),
            **seen,
        }
        for node, seen in zip(nodes, ray.get(found), strict=True)
    ]


def free(total_cpus: float, total_gpus: float) -> dict[str, float]:
    """What nobody uses, once that is all or WAIT_SECONDS have passed."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        there = ray.available_resources()
        cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
        if (cpus >= total_cpus and gpus >= total_gpus) or time.monotonic() > deadline:
            return {"free_cpus": cpus, "free_gpus": gpus}
        time.sleep(0.2)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    variables = question["variables"] | {"PYTHONPATH": os.pathsep.join(sys.path)}  # as Flower does it
    try:
        environment = {"env_vars": variables}
        ray.init(question["address"], runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        found = machines(question["paths"], question["mark"])
        total = ray.cluster_resources()
        return {"machines": found, **free(total.get("CPU", 0), total.get("GPU", 0))}
    except Exception as error:
        return {"error": str(error)}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
