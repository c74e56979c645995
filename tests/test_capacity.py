"""A run that this machine has no memory or GPUs for is refused; a process that is killed all the same is named."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest
from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources
from rich.console import Console

from copra_fl import events
from copra_fl.config import Config, ConfigError
from copra_fl.models.memory_plan import MemoryPlan
from copra_fl.simulation import capacity, superlink
from copra_fl.simulation.progress import cause_of_kill, last_error, oom_kills, watch
from copra_fl.simulation.superlink import RunFailed, Workers
from server.messaging import readable_reason

#: 1 GB of base, and 2 clients of 1 GB of adapter and 4 rows of 0.25 GB: 5 GB
PLAN = MemoryPlan(base=10**9, client=10**9, row=10**9 // 4, clients=2, batch_size=4, tokens=16)


@pytest.mark.parametrize(
    ("workers", "gpus", "available", "room"),
    [
        (None, None, 0, None),
        (4, 0.0, 0, None),
        (None, 1.0, 0, 0),
        (4, 0.5, 2, None),
        (5, 0.5, 2, 4),
        (3, 0.6, 2, 2),  # no worker uses parts of two GPUs
        (2, 2.0, 3, 1),
        (2, 1.5, 3, 1),  # above one, Ray takes whole GPUs only
        (None, 1.5, 1, 0),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    workers: int | None, gpus: float | None, available: int, room: int | None
) -> None:
    refused = pytest.raises(ConfigError, match=f"torch sees {available} GPUs .* room for {room} such workers")
    with nullcontext() if room is None else refused:
        capacity.check_gpus(workers, gpus, available)


def packed(number: int, share: float, gpus: int) -> bool:
    """Return whether Ray can place all workers, one after another: parts of one GPU, or whole ones that are free."""
    free = [10_000] * gpus  # Ray's units
    for _ in range(number):
        needed = [round(10_000 * share)] if share <= 1 else [10_000] * int(share)
        for units in needed:
            place = next((i for i, left in enumerate(free) if left >= units), None)
            if place is None:
                return False
            free[place] -= units
    return share <= 1 or share == int(share)


def actors(workers: Workers, gpus: int) -> int:
    """Return how many workers Flower starts on this machine."""
    options = dict(option.split("=") for option in workers.federation_config().split())
    node = {"Resources": {"CPU": float(options["init-args-num-cpus"]), "GPU": float(gpus)}}
    size = {f"num_{kind}": float(options[f"client-resources-num-{kind}"]) for kind in ("cpus", "gpus")}
    with mock.patch("ray.nodes", return_value=[node]):
        return pool_size_from_resources(size)


@pytest.mark.parametrize("gpus", range(1, 9))
def test_workers_get_the_largest_share_of_the_gpus_with_which_all_of_them_fit(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "num_gpus", lambda: gpus)
    for number in (*range(1, 33), 93):
        workers = Workers.share(number, num_clients=100)
        assert actors(workers, gpus) == number and packed(number, workers.gpus, gpus), (number, workers)
        larger = workers.gpus + (1e-4 if workers.gpus < 1 else 1)
        assert workers.gpus > 0 and not packed(number, larger, gpus), (number, workers)


@pytest.mark.parametrize(
    ("share", "gpus", "expected"),
    [
        (0.6, 2, (2, 1.0)),  # the second half of a GPU would not do for a third
        (0.4, 1, (2, 0.5)),
        (0.3, 1, (3, 0.3333)),
        (0.3, 2, (4, 0.3333)),  # six fit
        (1.5, 3, (1, 2.0)),
        (1.0, 3, (3, 1.0)),
        (0.0, 2, (4, 0.0)),
    ],
)
def test_a_given_share_of_a_gpu_is_rounded_and_limits_the_default_number_of_workers(
    share: float, gpus: int, expected: tuple[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "num_gpus", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    capacity.check_gpus(None, share, gpus)
    workers = Workers.share(None, num_clients=100, gpus_per_worker=share)
    assert (workers.number, workers.gpus) == expected
    assert packed(workers.number, workers.gpus, gpus) and actors(workers, gpus) == workers.number


@pytest.mark.parametrize(
    ("number", "gpus", "free", "gpu_memory", "message"),
    [
        (2, 0.0, 9.1e9, 0, ""),  # 1 GB of base that both share, and twice 4 GB
        (2, 0.0, 8.9e9, 0, "2 workers need 9.00 GB .* 8.90 GB are free.* or set max-memory-gb = 4.9 to train fewer"),
        (2, 0.0, 1.5e9, 0, "use fewer --workers, or set gradient-checkpointing = true$"),  # not even one client fits
        (2, 0.5, 1e9, 11e9, ""),
        (2, 0.5, 1e9, 9e9, "does not fit on a GPU: a worker needs 5.00 GB .* 0.5 of a GPU has 4.50 GB"),
    ],
)
def test_workers_that_do_not_fit_into_memory_are_refused(
    number: int, gpus: float, free: float, gpu_memory: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        capacity.check_memory(Config(), PLAN, Workers(number, 1, gpus, number), free, gpu_memory)


def test_checkpointing_is_no_remedy_where_it_is_on() -> None:
    config = Config.from_flat({"gradient-checkpointing": True})
    with pytest.raises(ConfigError, match="use fewer --workers$"):
        capacity.check_memory(config, PLAN, Workers(2, 1, 0.0, 2), 1.5e9, 0)


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cached"),
    [
        ("0::/a/b", "a", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/a/b", "memory/a", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_free_memory_is_that_of_the_tightest_control_group(
    tmp_path: Path, line: str, folder: str, limit: str, used: str, cached: str
) -> None:
    (tmp_path / "groups").write_text(f"9:cpuset:/other\n{line}\n")
    outer = tmp_path / folder
    (outer / "b").mkdir(parents=True)
    for group, number in ((outer, "1000"), (outer / "b", "max")):
        (group / limit).write_text(f"{number}\n")
        (group / used).write_text("700\n")
        (group / "memory.stat").write_text(f"anon 5\n{cached} 200\n")
    assert capacity.free_memory(tmp_path / "groups", tmp_path) == 1000 - 700 + 200
    available = capacity.free_memory(tmp_path / "none", tmp_path)
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_a_killed_server_app_ends_the_run_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flwr run` would go on for a minute, until Flower misses the heartbeats of the run."""
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    events.emit("server", pid=server.pid)
    server.kill()
    link: Any = SimpleNamespace(environment={events.VARIABLE: str(tmp_path / "events")}, log=tmp_path / "flower.log")
    streaming = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with pytest.raises(RunFailed, match="the process of the server app was killed, with 0 of 1 runs finished, by"):
            watch(link, streaming, 1, Console(quiet=True))
    finally:
        streaming.kill()
        streaming.wait()
        server.wait()


def test_a_run_goes_on_without_the_command_that_streams_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flwr run --stream` has ended; the SuperLink does not answer at first, then has started the server app."""
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    finish = "from copra_fl.events import emit; emit('finished', accuracy=None)"
    statuses = iter(["unknown", "starting", "running"])
    server = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(1); {finish}; time.sleep(9)"])

    def status() -> str:
        if (status := next(statuses)) == "running":
            events.emit("server", pid=server.pid)
        return status

    link: Any = SimpleNamespace(
        environment={events.VARIABLE: str(tmp_path / "events")}, log=tmp_path / "log", status=status, guard=server
    )
    try:
        watch(link, subprocess.Popen(["true"]), 1, Console(quiet=True))
    finally:
        server.kill()
        server.wait()


def test_a_run_that_flower_ends_is_reported_with_the_error_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    log = tmp_path / "flower.log"
    log.write_text("\x1b[92mINFO\x1b[0m: go\n\x1b[91mERROR\x1b[0m: no space left for apps\nand more\n")
    link: Any = SimpleNamespace(
        environment={events.VARIABLE: str(tmp_path / "events")},
        log=log,
        superlink_log=tmp_path / "superlink.log",
        status=lambda: "finished:failed",
    )
    message = "Flower ended with 0 of 1 runs finished (status: finished:failed): ERROR: no space left for apps\n"
    with pytest.raises(RunFailed, match=re.escape(message)):
        watch(link, subprocess.Popen(["true"]), 1, Console(quiet=True))
    assert last_error(tmp_path / "none") == "its log names no error"
    log.write_text("Traceback\n  raise\na.ImportError: no module 'server'\n\x1b[91mERROR\x1b[0m: Exit Code: 607\n")
    assert last_error(log) == "a.ImportError: no module 'server'"
    link.superlink_log.write_text("INFO: start\nERROR: Could not start run: Key 'rank' is not present\n")
    assert last_error(log, link.superlink_log) == "a.ImportError: no module 'server'"
    log.write_text("│ [code: 15] Invalid run configuration.\n")
    assert last_error(log, link.superlink_log) == "ERROR: Could not start run: Key 'rank' is not present"


def test_a_kill_for_want_of_memory_is_told_from_another(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    assert oom_kills(tmp_path / "vmstat") == 3 and oom_kills(tmp_path / "none") == 0
    assert cause_of_kill(oom_kills() - 1).startswith("since memory ran out")
    assert cause_of_kill(oom_kills()) == "by a signal such as SIGKILL"


def test_a_worker_that_was_killed_is_named_as_such() -> None:
    reason = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.'>"
    assert readable_reason(reason).startswith("its worker process was killed, most often because memory ran out; ")
    assert readable_reason("a KeyError") == "a KeyError"
