"""Nodes with data files of their own, in real containers, set in .env as docs/how-to/deploy.md describes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.containers.conftest import NUM_CLIENTS, Containers
from tests.support.real_runs import HANG_SECONDS
from tests.support.tiny import Settings, make_texts


@pytest.fixture(scope="module")
def local_files(deployment: Containers, settings: Settings) -> Iterator[Settings]:
    """Settings of a run on the files of 3 nodes, all of different sizes; afterwards the nodes have none again."""
    options = deployment.root / ".env"
    before = options.read_text()
    up = ("up", str(deployment.root), "--no-build", "--wait", str(HANG_SECONDS))
    with options.open("a") as file:
        for number in range(NUM_CLIENTS):
            data = deployment.root / "clients" / f"client-{number}" / "data"
            make_texts(data / "ward.csv", 100 + number, seed=number + 1).chmod(0o644)
            file.write(f'COPRA_FL_CLIENT_{number}=data-path="/data/ward.csv"\n')
    deployment.deploy(*up)
    yield settings | {"partitioner": "own", "num-rounds": 1}
    options.write_text(before)
    deployment.deploy(*up)


def test_each_node_trains_on_its_own_file(deployment: Containers, local_files: Settings) -> None:
    deployment.finish(deployment.start_run("own", local_files))
    (row,) = map(json.loads, deployment.rounds("own"))
    assert [client["examples"] for client in row["clients"]] == [100 - 10, 101 - 10, 102 - 10], "a tenth validates"


def test_a_node_with_unknown_labels_is_rejected_before_any_training(
    deployment: Containers, local_files: Settings
) -> None:
    file = deployment.root / "clients" / "client-1" / "data" / "ward.csv"
    with file.open("a") as table:
        table.write('"some words of nobody",secret-diagnosis,0\n')
    printed = deployment.finish(deployment.start_run("unknown-label", local_files), code=1)
    assert "(partition-id 1)" in printed and "1 of 102 examples have a label that is none of" in printed
    assert "secret-diagnosis" not in printed and "ward.csv" not in printed
    assert not deployment.rounds("unknown-label")
