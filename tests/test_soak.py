"""A soak: random processes of a run are killed again and again; it ends bitwise equal to the undisturbed run.

`make soak` takes minutes; `make soak ROUNDS=500` a quarter of an hour and more.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import psutil
import pytest

from tests.support.federations import assert_equal, final_adapter, journal
from tests.support.real_runs import RealRun, num_rounds, settings, wait_until
from tests.support.tiny import Settings

#: a kill every so many rounds
ROUNDS_PER_KILL = 8
#: parts of command lines: server app, SuperLink, worker, command, guard
VICTIMS = ("flwr-simulation", "private_superlink", "ClientAppActor", "bin/copra-fl", "guard.py")


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_at_random_ends_bitwise_equal(
    tiny: Settings, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    total, seed = request.config.getoption("--soak-rounds"), request.config.getoption("--soak-seed")
    print(f"seed {seed}")
    dice = random.Random(seed)
    flat = tiny | {"num-rounds": total, "local-steps": 5, "optimizer-state": "client", "eval-every": 10}
    arguments = ["simulate", *settings(flat), "--workers", "2", "--output"]
    RealRun([*arguments, "whole"], tmp_path).finish()
    killed, runs = 0, []
    while True:
        resumed = ["--resume"] if (tmp_path / "soak" / "config.toml").exists() else []
        run = RealRun([*arguments, "soak", *resumed], tmp_path)
        runs.append(run)
        while run.process.poll() is None:
            goal = num_rounds(tmp_path / "soak") + dice.randint(1, 2 * ROUNDS_PER_KILL)
            while run.process.poll() is None and num_rounds(tmp_path / "soak") < goal:
                time.sleep(0.01)
            time.sleep(dice.random() / 4)  # anywhere in a round
            if run.process.poll() is None and (victim := find_victim(run, dice)) is not None:
                victim.kill()  # a run survives the loss of its guard
                killed += 1
        out, err = run.process.communicate(timeout=600)
        if (tmp_path / "soak" / "summary.json").exists() and run.process.returncode == 0:
            break
        assert run.process.returncode != 2, f"the command could not go on: {err}"
    print(f"{killed} kills in {total} rounds")
    assert killed >= total // (4 * ROUNDS_PER_KILL)
    assert_equal(final_adapter(tmp_path / "soak"), final_adapter(tmp_path / "whole"))
    assert [row["round"] for row in journal(tmp_path / "soak")] == list(range(1, total + 1))
    whole, soaked = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "soak"))
    assert whole["test"] == soaked["test"]
    wait_until(lambda: not any(run.processes() for run in runs), "no process left")


def find_victim(run: RealRun, dice: random.Random) -> psutil.Process | None:
    """Return a process of the run, of a random kind; None before one of that kind has started."""
    processes = run.processes(dice.choice(VICTIMS))
    return dice.choice(sorted(processes, key=lambda process: process.pid)) if processes else None
