"""Compare what a simulation needs with what this machine has, before anything starts.

The kernel kills a process that takes more memory than there is, minutes into a run and without a message, and Flower
waits for GPUs that do not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from copra_fl.config import Config, ConfigError
from copra_fl.models.memory_plan import GB, MemoryPlan, checkpointing_remedy
from copra_fl.simulation.superlink import Workers, room_for

CGROUPS = Path("/sys/fs/cgroup")


def check_gpus(workers: int | None, gpus_per_worker: float | None, available: int) -> None:
    """Raise ConfigError if workers of `gpus_per_worker` GPUs do not fit on `available` GPUs.

    A worker with less than one GPU takes a part of a single one, another one whole GPUs. `workers` is the number that
    the user asks for; None for as many as fit, at least one.
    """
    if not gpus_per_worker:
        return
    if (fit := room_for(gpus_per_worker, available)) < (number := workers or 1):
        raise ConfigError(
            f"--gpus-per-worker {gpus_per_worker:g}: torch sees {available} GPUs on this machine, which has room for "
            f"{fit} such workers, not {number}; "
            + ("lower --workers or --gpus-per-worker" if available else "leave --gpus-per-worker out to use the CPU")
        )


def check_memory(config: Config, plan: MemoryPlan, workers: Workers, free: float, gpu_memory: float) -> None:
    """Raise ConfigError if the workers do not fit into memory, each with the memory of `plan`.

    On a CPU all workers share the base. The memory of Python and of the server is not counted, so a run that passes can
    still be too large.

    Args:
        free: free bytes of this machine (`free_memory`).
        gpu_memory: bytes of its smallest GPU; 0 without a GPU.
    """
    if config.model.device != "cpu" and workers.gpus > 0 and gpu_memory > 0:
        share = min(1.0, workers.gpus)
        if plan.total > (limit := share * gpu_memory):
            raise ConfigError(
                f"the run does not fit on a GPU: a worker needs {plan}, and {share:g} of a GPU has "
                f"{limit / GB:.2f} GB; {_remedies(config, plan, limit)}"
            )
    elif (needed := plan.base + workers.number * (plan.total - plan.base)) > free:
        raise ConfigError(
            f"the run does not fit into memory: {workers.number} workers need {needed / GB:.2f} GB (each {plan}; the "
            f"base is shared), and {free / GB:.2f} GB are free; "
            + _remedies(config, plan, plan.base + (free - plan.base) / workers.number)
        )


def _remedies(config: Config, plan: MemoryPlan, limit: float) -> str:
    """Return what to change so that a worker needs at most `limit` bytes."""
    fewer = f", or set max-memory-gb = {int(10 * limit / GB) / 10:g} to train fewer clients together"
    return (
        f"lower rank = {config.model.rank}, batch-size = {config.training.batch_size} or max-length = "
        f"{config.data.max_length}, use fewer --workers{fewer if plan.clients_within(limit) else ''}"
        + checkpointing_remedy(config)
    )


def smallest_gpu_memory() -> int:
    """Return the bytes of this machine's smallest GPU; 0 without a GPU."""
    import torch

    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(device).total_memory for device in devices), default=0)


def free_memory(own_groups: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int:
    """Return the bytes that this process and its children can still take: of the machine, and of their control groups.

    Args:
        own_groups: names the control group of this process (cgroups(7), versions 1 and 2).
        root: folder where control groups are mounted.
    """
    return min([psutil.virtual_memory().available, *_free_in_groups(own_groups, root)])


def _free_in_groups(own_groups: Path, root: Path) -> Sequence[int]:
    """Return the free bytes of each control group with a limit that this process is in.

    Files that the kernel keeps in memory count as free if they were not used lately.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:  # not Linux
        return []
    free = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            mount, limit_name, used_name, files = (
                (root, "memory.max", "memory.current", "inactive_file")
                if controllers == ""
                else (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            )
            group = mount / name.lstrip("/")
            for folder in (group, *group.parents):
                limit, used = _number(folder / limit_name), _number(folder / used_name)
                if limit is not None and used is not None:
                    free.append(max(0, limit - used + _statistic(folder / "memory.stat", files)))
                if folder == mount:
                    break
    return free


def _number(path: Path) -> int | None:
    """Return the number in a file; None for a missing file, and for the word ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
    except (OSError, StopIteration):
        return 0
