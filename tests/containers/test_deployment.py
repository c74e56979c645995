"""What a deployment promises, in real containers: whom it lets in, what it ends in, what it survives."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from copra_fl.adapter import Adapter, load_checkpoint
from copra_fl.deployment import certificates
from copra_fl.deployment.folder import Folder
from tests.containers.conftest import PATIENCE, Containers

Settings = dict[str, object]


def final(directory: Path) -> Adapter:
    return load_checkpoint(max((directory / "checkpoints").glob("*.safetensors")))[0]


@pytest.fixture(scope="module")
def undisturbed(deployment: Containers, settings: Settings) -> Path:
    """A run of three rounds that nothing happens to: its folder."""
    deployment.finish(deployment.start_run("undisturbed", settings))
    return deployment.root / "runs" / "undisturbed"


def test_a_run_over_three_clients_ends_in_an_adapter_that_peft_opens(undisturbed: Path, tiny_model: str) -> None:
    rows = [json.loads(line) for line in (undisturbed / "journal.jsonl").read_text().splitlines()]
    assert [[each["client"] for each in row["clients"]] for row in rows] == [[0, 1, 2]] * 3
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(undisturbed / "adapter"))
    last = final(undisturbed)
    parameters = {name: each for name, each in encoder.named_parameters() if ".lora_" in name}
    assert parameters
    for name, parameter in parameters.items():
        assert torch.equal(parameter, last[name.replace(".default.", ".")])


def test_status_names_who_is_connected(deployment: Containers) -> None:
    status = json.loads(deployment.deploy("status", str(deployment.root), "--json"))
    assert {node["name"]: node["status"] for node in status["nodes"]} == {f"client-{i}": "online" for i in range(3)}


def test_status_has_the_last_round_of_each_run(deployment: Containers, undisturbed: Path) -> None:
    runs = json.loads(deployment.deploy("status", str(deployment.root), "--json"))["runs"]
    (run,) = [run for run in runs if run["run"] == undisturbed.name]
    assert (run["round"], run["clients"], run["finished"]) == ("3/3", 3, True)


@pytest.mark.parametrize("kind", ["no key", "wrong CA"])
def test_a_stranger_is_turned_away(deployment: Containers, tmp_path: Path, kind: str) -> None:
    """A container on the deployment's own network, with client-0's key or CA but not both."""
    tls = tmp_path / "tls"
    shutil.copytree(Folder(deployment.root).client(0).tls, tls)
    if kind == "wrong CA":
        other = Folder(tmp_path / "other")
        other.make(0)
        certificates.make_ca(other)
        shutil.copy(other.tls / "ca.crt", tls / "ca.crt")
    subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
    key = [] if kind == "no key" else ["--auth-supernode-private-key=/tls/node.key"]
    image = deployment.engine("inspect", "--format", "{{.Image}}", deployment.container("superlink"))
    command = ["run", "--rm", f"--network={deployment.network()}", f"--volume={tls}:/tls:ro", "--tmpfs=/state:mode=777"]
    node = ["flower-supernode", "--superlink=superlink:8000", "--root-certificates=/tls/ca.crt", *key]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        deployment.engine(*command, image, *node)
    reason = {"no key": "All SuperNodes must be registered", "wrong CA": "certificate verify failed"}[kind]
    assert reason in refused.value.stdout + refused.value.stderr


def test_a_killed_client_costs_a_round_and_comes_back(deployment: Containers, settings: Settings) -> None:
    """kill -9 once round 1 is over: round 2 ends without it, or with what it had sent; all are there in the last."""
    patient = settings | {"failures": "tolerant", "min-replies": 2, "round-timeout": 90, "num-rounds": 5}
    run = deployment.start_run("killed-client", patient)
    deployment.wait(lambda: len(deployment.rounds("killed-client")) >= 1, "round 1")
    deployment.kill("client-1")
    deployment.finish(run)
    rows = [json.loads(line) for line in deployment.rounds("killed-client")]
    missing = [[each["client"] for each in row["missing"]] for row in rows]
    assert [1] in missing and all(each in ([], [1]) for each in missing), "no other client was harmed"
    assert missing[-1] == [] and [each["client"] for each in rows[-1]["clients"]] == [0, 1, 2]


def test_a_killed_superlink_loses_nothing(deployment: Containers, settings: Settings, undisturbed: Path) -> None:
    """kill -9 once round 1 is over; the container comes back by itself, --resume ends with the same adapter."""
    run = deployment.start_run("killed-server", settings)
    deployment.wait(lambda: len(deployment.rounds("killed-server")) >= 1, "round 1")
    deployment.kill("superlink")
    assert "--resume" in deployment.finish(run, code=1)
    assert len(deployment.rounds("killed-server")) < 3, "it was stopped in the middle"
    deployment.deploy("up", str(deployment.root), "--no-build", "--wait", str(PATIENCE))
    deployment.finish(deployment.start_run("killed-server", settings, "--resume"))
    resumed, expected = final(deployment.root / "runs" / "killed-server"), final(undisturbed)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_cut_network_costs_a_round(deployment: Containers, settings: Settings) -> None:
    """`network disconnect` of one client in the middle; it is connected again, and trains again."""
    patient = settings | {"failures": "tolerant", "min-replies": 2, "round-timeout": 90, "num-rounds": 5}
    run = deployment.start_run("cut-network", patient)
    deployment.wait(lambda: len(deployment.rounds("cut-network")) >= 1, "round 1")
    network, client = deployment.network(), deployment.container("client-2")
    deployment.engine("network", "disconnect", network, client)
    deployment.wait(
        lambda: any(json.loads(line)["missing"] for line in deployment.rounds("cut-network")), "a round without it"
    )
    deployment.engine("network", "connect", network, client)
    deployment.finish(run)
    rows = [json.loads(line) for line in deployment.rounds("cut-network")]
    missing = [[each["client"] for each in row["missing"]] for row in rows]
    assert [2] in missing and all(each in ([], [2]) for each in missing)
    assert missing[-1] == []
