"""Faults of a deployment in real containers: killed processes, a cut network, a full disk.

docs/explanations/reliability.md describes their effects.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.containers.conftest import NUM_CLIENTS, Containers
from tests.support.federations import final_adapter
from tests.support.real_runs import HANG_SECONDS
from tests.support.tiny import Settings

SERVICES = ["superlink", *(f"client-{number}" for number in range(NUM_CLIENTS))]


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """Settings of a run of five rounds that tolerates a missing client in each round."""
    return settings | {"failures": "tolerant", "min-replies": 2, "round-timeout-s": 90, "num-rounds": 5}


def assert_same(run: Path, undisturbed: Path) -> None:
    adapter, expected = final_adapter(run), final_adapter(undisturbed)
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)


def missing(deployment: Containers, run: str) -> list[list[int]]:
    """Return the clients that were missing in each round."""
    return [[client["client"] for client in json.loads(line)["missing"]] for line in deployment.rounds(run)]


def test_a_killed_client_costs_a_round_and_comes_back(deployment: Containers, patient: Settings) -> None:
    num_unanswered = deployment.num_unanswered("client-1")
    run = deployment.start_run("killed-client", patient | {"local-steps": 1000, "num-rounds": 8})
    deployment.wait(lambda: len(deployment.rounds("killed-client")) >= 1, "round 1")
    deployment.kill_while_training("client-1", num_unanswered)
    deployment.finish(run)
    absent = missing(deployment, "killed-client")
    assert absent[0] == [] and [1] in absent and all(clients in ([], [1]) for clients in absent)
    assert absent[-1] == [], "it came back"


def test_a_cut_network_costs_a_round(deployment: Containers, patient: Settings) -> None:
    """Disconnect a client from the network during the run, then connect it again: it trains again."""
    run = deployment.start_run("cut-network", patient)
    deployment.wait(lambda: len(deployment.rounds("cut-network")) >= 1, "round 1")
    network, client = deployment.network(), deployment.container("client-2")
    deployment.engine("network", "disconnect", network, client)
    deployment.wait(lambda: any(missing(deployment, "cut-network")), "a round without it")
    deployment.engine("network", "connect", network, client)
    deployment.finish(run)
    absent = missing(deployment, "cut-network")
    assert [2] in absent and all(clients in ([], [2]) for clients in absent), "no other client was missing"
    assert absent[-1] == []


@pytest.mark.parametrize("killed", [["superlink"], SERVICES], ids=["superlink", "machine"])
def test_a_killed_server_loses_nothing(
    deployment: Containers, settings: Settings, undisturbed: Path, killed: list[str]
) -> None:
    """SIGKILL after round 1: the containers restart by themselves, and --resume ends with the same adapter."""
    name = f"killed-{len(killed)}"
    run = deployment.start_run(name, settings)
    deployment.wait(lambda: len(deployment.rounds(name)) >= 1, "round 1")
    for service in killed:
        deployment.kill(service)
    assert "--resume" in deployment.finish(run, code=1)
    assert len(deployment.rounds(name)) < 3, "it was stopped in the middle"
    deployment.deploy("up", str(deployment.root), "--no-build", "--wait", str(HANG_SECONDS))
    deployment.finish(deployment.start_run(name, settings, "--resume"))
    assert_same(deployment.root / "runs" / name, undisturbed)


def test_two_runs_at_once_do_not_mix(deployment: Containers, settings: Settings, undisturbed: Path) -> None:
    runs = [deployment.start_run(name, settings) for name in ("first", "second")]
    for run in runs:
        deployment.finish(run)
    for name in ("first", "second"):
        assert_same(deployment.root / "runs" / name, undisturbed)


@pytest.fixture
def small_disk(deployment: Containers) -> Iterator[Path]:
    """A run's folder on a disk of 8 MB, mounted into the SuperLink's container by a restart."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = deployment.root / "runs" / "full-disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=777", "tmpfs", folder], check=True)
    try:
        deployment.engine("restart", deployment.container("superlink"))
        deployment.deploy("up", str(deployment.root), "--no-build", "--wait", str(HANG_SECONDS))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_stopped_by_a_full_disk_can_be_resumed(
    deployment: Containers, settings: Settings, undisturbed: Path, small_disk: Path
) -> None:
    """The disk fills up after round 1; when it has space again, --resume ends with the same adapter."""
    run = deployment.start_run(small_disk.name, settings)
    deployment.wait(lambda: len(deployment.rounds(small_disk.name)) >= 1, "round 1")
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(shutil.disk_usage(small_disk).free or 1))
    printed = deployment.finish(run, code=1)
    assert f"the disk of /runs/{small_disk.name} is full" in printed and "--resume" in printed
    filler.unlink()
    deployment.finish(deployment.start_run(small_disk.name, settings, "--resume"))
    assert_same(small_disk, undisturbed)
