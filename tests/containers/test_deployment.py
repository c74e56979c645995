"""A deployment in real containers: its runs, its status, and rejected nodes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from copra_fl.deployment import certificates
from copra_fl.deployment.layout import DeploymentLayout
from tests.containers.conftest import Containers
from tests.support.federations import final_adapter


def test_a_run_over_three_clients_ends_in_an_adapter_that_peft_opens(undisturbed: Path, tiny_model: str) -> None:
    rows = [json.loads(line) for line in (undisturbed / "journal.jsonl").read_text().splitlines()]
    assert [[client["client"] for client in row["clients"]] for row in rows] == [[0, 1, 2]] * 3
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(undisturbed / "adapter"))
    last = final_adapter(undisturbed)
    parameters = {name: parameter for name, parameter in encoder.named_parameters() if ".lora_" in name}
    assert parameters
    for name, parameter in parameters.items():
        assert torch.equal(parameter, last[name.replace(".default.", ".")])


def test_status_lists_the_connected_nodes(deployment: Containers) -> None:
    status = json.loads(deployment.deploy("status", str(deployment.root), "--json"))
    assert {node["name"]: node["status"] for node in status["nodes"]} == {f"client-{i}": "online" for i in range(3)}


def test_status_has_the_last_round_of_each_run(deployment: Containers, undisturbed: Path) -> None:
    runs = json.loads(deployment.deploy("status", str(deployment.root), "--json"))["runs"]
    (run,) = [run for run in runs if run["run"] == undisturbed.name]
    assert (run["round"], run["clients"], run["finished"]) == ("3/3", 3, True)


@pytest.mark.parametrize("kind", ["no key", "wrong CA"])
def test_an_unregistered_node_is_rejected(deployment: Containers, tmp_path: Path, kind: str) -> None:
    """A container on the deployment's network, with either the key of client-0 or its CA, but not both."""
    tls = tmp_path / "tls"
    shutil.copytree(DeploymentLayout(deployment.root).client(0).tls, tls)
    if kind == "wrong CA":
        other = DeploymentLayout(tmp_path / "other")
        other.make_folders(0)
        certificates.make_ca(other)
        shutil.copy(other.tls / "ca.crt", tls / "ca.crt")
    subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
    key = [] if kind == "no key" else ["--auth-supernode-private-key=/tls/node.key"]
    image = deployment.engine("inspect", "--format", "{{.Image}}", deployment.container("superlink"))
    command = ["run", "--rm", f"--network={deployment.network()}", f"--volume={tls}:/tls:ro", "--tmpfs=/state:mode=777"]
    module = ["python", "-m", "copra_fl.deployment.supernode"]
    node = [*module, "--superlink=superlink:8000", "--root-certificates=/tls/ca.crt", *key]
    with pytest.raises(subprocess.CalledProcessError) as rejected:
        deployment.engine(*command, image, *node)
    reason = {"no key": "its key is not", "wrong CA": "certificate verify failed"}[kind]
    assert reason in rejected.value.stdout + rejected.value.stderr


def test_a_client_reaches_the_server_and_nothing_else(deployment: Containers) -> None:
    """It connects to the server's address in its own network only, and has no route to others."""
    addresses = "{{range $name, $network := .NetworkSettings.Networks}}{{$name}}={{$network.IPAddress}} {{end}}"
    networks = deployment.engine("inspect", "--format", addresses, deployment.container("superlink")).split()
    by_name = dict(network.split("=") for network in networks)
    shared = by_name.pop(deployment.network())
    (outside,) = by_name.values()
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 8000), 5); print('connected')"
    for service, address, reached in (
        ("client-0", "superlink", True), ("client-0", shared, True), ("client-0", outside, False),
        ("superlink", outside, True),
    ):  # fmt: skip
        printed = deployment.in_container(service, "python", "-c", connect, address)
        assert ("connected" in printed) == reached, (service, address, printed)
    routes = "print(*(line.split()[1] for line in open('/proc/net/route')))"
    assert "00000000" in deployment.in_container("superlink", "python", "-c", routes).split()
    assert "00000000" not in deployment.in_container("client-0", "python", "-c", routes).split()


def test_keys_are_hidden_from_processes_of_the_same_user(deployment: Containers) -> None:
    """The first process of a container cannot be inspected; tests/test_hostile_containers.py tests its children."""
    for service in ("client-0", "superlink"):
        assert "Permission denied" in deployment.in_container(service, "ls", "/proc/1/fd")
        assert "Landlock cannot be used" not in deployment.engine("logs", deployment.container(service))
