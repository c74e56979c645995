"""Inspect the machines of a Ray cluster. A script, run as a process of its own because importing Ray takes long.

    python -P inspect_ray.py < QUESTION > ANSWER

Both are JSON. The question has `address`; `variables` for the environment of Ray's workers; `paths` that every machine
must have; and `mark`, the name of a file in this machine's cache folder. The answer has `machines`, `free_cpus` and
`free_gpus` of the whole cluster; or `error`.
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

#: maximum wait for workers of a run that was just killed to free their cores
WAIT_SECONDS = 20


def inspect_machine(paths: list[str], mark: str) -> dict[str, Any]:
    """Return digest, versions, missing paths and cache of the machine that this runs on; or an error."""
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


def inspect_machines(paths: list[str], mark: str) -> list[dict[str, Any]]:
    """Return address, cores, GPUs and the result of `inspect_machine` for each machine with cores."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    tasks = [
        ray.remote(inspect_machine)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(paths, mark)
        for node in nodes
    ]
    return [
        {
            "address": node["NodeManagerAddress"],
            "cpus": node["Resources"]["CPU"],
            "gpus": node["Resources"].get("GPU", 0),
            **inspected,
        }
        for node, inspected in zip(nodes, ray.get(tasks), strict=True)
    ]


def wait_for_free_resources(total_cpus: float, total_gpus: float) -> dict[str, float]:
    """Wait until all cores and GPUs are free, at most WAIT_SECONDS; return the free ones."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        available = ray.available_resources()
        cpus, gpus = available.get("CPU", 0), available.get("GPU", 0)
        if (cpus >= total_cpus and gpus >= total_gpus) or time.monotonic() > deadline:
            return {"free_cpus": cpus, "free_gpus": gpus}
        time.sleep(0.2)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to `question` (see the module's docstring)."""
    variables = question["variables"] | {"PYTHONPATH": os.pathsep.join(sys.path)}  # as Flower sets it
    try:
        environment = {"env_vars": variables}
        ray.init(question["address"], runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        machines = inspect_machines(question["paths"], question["mark"])
        total = ray.cluster_resources()
        return {"machines": machines, **wait_for_free_resources(total.get("CPU", 0), total.get("GPU", 0))}
    except Exception as error:
        return {"error": str(error)}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
