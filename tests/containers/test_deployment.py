"""What a deployment promises, in real containers: whom it lets in, what it ends in."""

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
from copra_fl.deployment.layout import Folder
from tests.containers.conftest import Containers
from tests.support.federations import final_adapter


def test_a_run_over_three_clients_ends_in_an_adapter_that_peft_opens(undisturbed: Path, tiny_model: str) -> None:
    rows = [json.loads(line) for line in (undisturbed / "journal.jsonl").read_text().splitlines()]
    assert [[each["client"] for each in row["clients"]] for row in rows] == [[0, 1, 2]] * 3
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(undisturbed / "adapter"))
    last = final_adapter(undisturbed)
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
