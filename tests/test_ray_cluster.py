"""A simulation on a Ray cluster of two nodes: two raylets on this machine, each with workers of its own."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster as LocalCluster

from copra_fl.config import Config, ConfigError
from copra_fl.simulation.ray_cluster import (
    Cluster,
    Machine,
    check,
    check_address,
    divide,
    inspect_cluster,
    version_notes,
)
from copra_fl.simulation.superlink import round_gpu_share
from tests.support.federations import final_adapter
from tests.support.real_runs import RealRun, settings
from tests.support.tiny import Settings


def machines(*sizes: tuple[float, float]) -> Cluster:
    """Return a free cluster of machines with these cores and GPUs."""
    cluster = tuple(Machine(f"10.0.0.{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes))
    return Cluster("10.0.0.0:6379", cluster, sum(cpus for cpus, _ in sizes), sum(gpus for _, gpus in sizes))


@pytest.mark.parametrize(
    ("sizes", "number", "gpus", "expected"),
    [
        ([(8, 0), (8, 0)], None, None, (8, 2, 0)),  # four on each machine
        ([(1, 0), (1, 0)], None, None, (2, 1, 0)),
        ([(8, 0), (2, 0)], 2, None, (2, 4, 0)),  # both on the larger one
        ([(2, 0), (2, 0)], 3, None, (3, 1, 0)),
        ([(16, 2), (16, 1)], 3, None, (3, 8, 1.0)),
        ([(16, 2), (16, 1)], 4, None, (4, 8, 0.5)),
        ([(64, 0), (8, 1)], None, None, (4, 2, 0.25)),  # on the machine with the GPU, not on that with more cores
        ([(64, 0), (8, 1)], 6, 0, (6, 10, 0)),
        ([(8, 2), (8, 2)], None, 0.6, (4, 4, 1.0)),
    ],
)
def test_workers_are_the_largest_of_which_all_fit(
    sizes: list[tuple[float, float]], number: int | None, gpus: float | None, expected: tuple[int, int, float]
) -> None:
    workers = divide(machines(*sizes), number, 100, gpus)
    assert (workers.number, workers.cpus, workers.gpus) == pytest.approx(expected)
    assert workers.nodes == workers.number and "init-args" not in workers.federation_config()
    assert divide(machines(*sizes), number, 1, gpus).number == 1, "never more than clients"


def test_workers_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ConfigError, match="has room for 4 workers, not 5: each needs a core and 0 GPUs"):
        divide(machines((2, 0), (2, 0)), 5, 100, None)
    with pytest.raises(ConfigError, match="room for 0 workers, not 1: each needs a core and 0.5 GPUs"):
        divide(machines((2, 0)), None, 100, 0.5)


@pytest.mark.parametrize(("share_of_gpu", "fit"), [(0.6, 1), (0.5, 2), (0.4, 2), (1 / 3, 3), (1 / 7, 7)])
def test_equally_many_workers_fit_after_rounding(share_of_gpu: float, fit: int) -> None:
    rounded = round_gpu_share(share_of_gpu)
    assert rounded * fit <= 1 and int(1 / rounded) == fit and rounded >= share_of_gpu - 1e-4


@pytest.mark.parametrize("address", ["10.0.0.5", "ray://10.0.0.5:10001", ":6379", "auto", "host:port"])
def test_an_address_of_another_form_is_rejected(address: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT, like 10.0.0.5:6379"):
        check_address(address)


def test_an_address_without_a_cluster_is_rejected_before_anything_starts(tmp_path: Path) -> None:
    """The command itself tries the address first: Ray would try for two minutes."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        run = RealRun(["compare", "--ray-address", address, "--output", "run"], tmp_path)
        _, err = run.finish(code=2)
    assert f"--ray-address {address}: no Ray cluster answers there" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def ray_cluster(cache: None) -> Iterator[LocalCluster]:
    """Two nodes of one core each, started without the environment variable of the tests' cache."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # the path of a socket must be short
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_TMPDIR", short)
            patch.delenv("COPRA_FL_CACHE")
            cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def inspected(ray_cluster: LocalCluster, tiny: Settings) -> Cluster:
    return inspect_cluster(ray_cluster.address, [str(tiny["dataset"]), "/nowhere/texts.csv"])


def test_each_machine_is_inspected(inspected: Cluster) -> None:
    assert (inspected.cpus, inspected.gpus, inspected.free_cpus) == (2, 0, 2) and len(inspected.machines) == 2
    for machine in inspected.machines:
        assert machine.missing == ["/nowhere/texts.csv"] and machine.shares_cache and not machine.error
    assert not version_notes(inspected)


@pytest.mark.parametrize(
    ("changes", "flat", "message"),
    [
        (
            {"missing": ["/nowhere/it.csv"]},
            {},
            "machine .* does not have /nowhere/it.csv; paths in dataset, test-file and model",
        ),
        ({"digest": "0123456789abcdef"}, {}, r"has other sources of copra_fl \(digest 0123456789ab\)"),
        ({"error": "No module named 'copra_fl'"}, {}, "cannot import copra_fl .*; install copra-fl there"),
        ({"shares_cache": False}, {"uplink-dtype": "int8"}, "uplink-dtype = 'int8' clients keep state there"),
    ],
)
def test_a_machine_that_cannot_train_is_named(inspected: Cluster, changes: dict, flat: Settings, message: str) -> None:
    first, second = (replace(machine, missing=[]) for machine in inspected.machines)
    with pytest.raises(ConfigError, match=message):
        check(replace(inspected, machines=(first, replace(second, **changes))), [Config.from_flat(flat)])


def test_a_cluster_in_use_is_rejected_and_other_versions_are_noted(inspected: Cluster) -> None:
    good = tuple(replace(machine, missing=[]) for machine in inspected.machines)
    check(replace(inspected, machines=good), [Config()])
    with pytest.raises(ConfigError, match="is in use: 1 of 2 cores and 0 of 0 GPUs are free"):
        check(replace(inspected, machines=good, free_cpus=1), [Config()])
    newer = replace(good[0], address="10.0.0.6", versions=good[0].versions | {"torch": "99.0"})
    assert version_notes(replace(inspected, machines=(newer,)))[0].startswith("machine 10.0.0.6 has torch 99.0, unlike")


def training(raylet: int) -> bool:
    """Return True while a worker of this Ray node trains or evaluates."""
    with suppress(psutil.Error):
        return any("ray::ClientAppActor.run" in worker.cmdline() for worker in psutil.Process(raylet).children())
    return False


@pytest.mark.slow
@pytest.mark.parametrize("secure", [{}, {"secure-aggregation": True, "path-pairs": 0}], ids=["plain", "secure"])
def test_two_nodes_train_and_give_what_one_machine_gives(
    ray_cluster: LocalCluster, tiny: Settings, secure: Settings, tmp_path: Path
) -> None:
    """With secure aggregation too, whose secrets of a round lie in the state that Flower keeps for each node."""
    mine = settings(tiny | secure | {"local-steps": 100, "num-rounds": 3})
    arguments = ["simulate", *mine, "--ray-address", ray_cluster.address, "--output", "cluster", "--json"]
    run, active = RealRun(arguments, tmp_path), set[int]()
    raylets = {node.all_processes["raylet"][0].process.pid for node in ray_cluster.list_all_nodes()}

    def both_have_trained() -> bool:
        active.update(filter(training, raylets))
        return active == raylets or run.process.poll() is not None

    run.wait_until(both_have_trained, "workers on both nodes")
    out, err = run.finish()
    assert active == raylets and len(raylets) == 2
    assert "2 workers on a Ray cluster of 2 machines, 1 cores and 0 GPUs per worker" in err
    RealRun(["simulate", *mine, "--workers", "2", "--output", "here"], tmp_path).finish()
    expected, reached = final_adapter(tmp_path / "here"), final_adapter(tmp_path / "cluster")
    assert all(torch.equal(reached[name], expected[name]) for name in expected)
    assert json.loads(out)["rounds"] == 3
