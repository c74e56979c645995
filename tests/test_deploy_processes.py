"""A deployment without containers: SuperLink and SuperNodes as processes on this machine, with TLS and keys.

They run the unchanged apps with the commands of docker-compose.yml, but with other paths and ports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from peft import PeftModel
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModel

from copra_fl.config import Config, toml_value
from copra_fl.deployment import certificates, operator_secret
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.registration import fingerprint, read_registered
from copra_fl.records import AuditEvent, read_records
from copra_fl.simulation.superlink import copy_app, free_port
from tests.support.documents import ROOT
from tests.support.real_runs import HANG_SECONDS
from tests.support.scripts import write_script

pytestmark = pytest.mark.slow

SCRIPTS = Path(sys.executable).parent

#: `python -m copra_fl.deployment.supernode`, with a clock that is ahead by the first argument
SUPERNODE = """
import datetime, runpy, sys

seconds_ahead = datetime.timedelta(seconds=int(sys.argv.pop(1)))

class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + seconds_ahead

if seconds_ahead:
    datetime.datetime = Clock
runpy.run_module("copra_fl.deployment.supernode", run_name="__main__")
"""


@dataclass
class Processes:
    """A deployment's folder, and the processes started for it."""

    layout: DeploymentLayout
    port: int
    metrics_port: int = field(default_factory=free_port)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        home = self.layout.flower_home if name == "superlink" else self.layout.root / name
        environment = os.environ | {
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "COPRA_FL_LOG": "json",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PYTHONPATH": f"{self.plugins}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        with open(self.log(name), "ab") as log:
            self.started[name] = subprocess.Popen(
                command, env=environment, cwd=self.layout.runs, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return self.started[name]

    def start_superlink(self) -> None:
        tls, state = self.layout.tls, self.layout.state
        self.start(
            "superlink", sys.executable, "-m", "copra_fl.deployment.superlink", f"--nodes={self.layout.nodes}",
            f"--metrics-port={self.metrics_port}", f"--runs={self.layout.runs}",
            "--host=0.0.0.0", f"--port={self.port}", f"--database={state / 'superlink.db'}",
            f"--ssl-ca-certfile={tls / 'ca.crt'}", f"--ssl-certfile={tls / 'server.crt'}",
            f"--ssl-keyfile={tls / 'server.key'}", "--enable-supernode-auth",
        )  # fmt: skip

    def start_node(
        self,
        name: str,
        ca: Path,
        key: Path | None,
        partition: int = 0,
        keep_warm: int = 0,
        seconds_ahead: int = 0,
        config: str = "",
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode with a clock that is so far ahead, and further words of its node config."""
        keys = [f"--auth-supernode-private-key={key}"] if key else []
        config = f"partition-id={partition} num-partitions=2 warm-process={keep_warm} {config}"
        return self.start(
            name, sys.executable, "-c", SUPERNODE, str(seconds_ahead),
            f"--superlink=localhost:{self.port}", f"--port={free_port()}",
            f"--root-certificates={ca}", f"--node-config={config}", *keys,
        )  # fmt: skip

    @property
    def plugins(self) -> Path:
        """The folder of modules that all processes can import."""
        return self.layout.root / "plugins"

    def log(self, name: str) -> Path:
        return self.layout.root / f"{name}.log"

    def start_nodes(self, keep_warm: int, configs: Sequence[str] = ("", "")) -> None:
        """Start both nodes in place of those that run, and wait until they are connected."""
        for number in range(2):
            name, client = f"node-{number}", self.layout.client(number)
            if name in self.started:
                self.started[name].terminate()
                self.started[name].wait()
                self.log(name).unlink()
            self.start_node(name, client.tls / "ca.crt", client.key, number, keep_warm, config=configs[number])
        self.wait(
            lambda: all(self.logged(f"node-{number}", "SuperNode ID") for number in range(2)), "both nodes connected"
        )

    def start_run(self, app: Path, settings: dict[str, object]) -> subprocess.Popen[str]:
        """Submit a run; the returned process ends with it."""
        if not (app / "pyproject.toml").exists():
            copy_app(app)
        overrides = " ".join(f"{key}={toml_value(value)}" for key, value in settings.items())  # type: ignore[arg-type]
        command = [SCRIPTS / "flwr", "run", str(app), "deployment", "--stream", "--run-config", overrides]
        environment = os.environ | {"FLWR_HOME": str(self.layout.flower_home)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def warm_processes(self, name: str) -> list[int]:
        """The process ids of the warm processes that have answered on a node, in their order."""
        processes = re.findall(r"warm process (\d+): \w+", self.log(name).read_text(errors="replace"))
        return list(dict.fromkeys(map(int, processes)))

    def logged(self, name: str, text: str) -> bool:
        return text in self.log(name).read_text(errors="replace")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            logs = "".join(f"\n--- {name}\n{self.log(name).read_text(errors='replace')}" for name in self.started)
            assert time.monotonic() < deadline, f"waited {HANG_SECONDS} s for: {what}{logs}"
            time.sleep(0.2)

    def stop(self) -> None:
        running = [psutil.Process(process.pid) for process in self.started.values() if process.poll() is None]
        for process in [child for parent in running for child in parent.children(recursive=True)] + running:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A SuperLink and two registered nodes, all connected."""
    layout, port = DeploymentLayout(tmp_path_factory.mktemp("deployment")), free_port()
    layout.make_folders(2)
    certificates.make_ca(layout)
    certificates.make_server_certificate(layout, [])
    certificates.make_node_keys(layout, range(2))
    certificates.share_ca(layout, 2)
    processes = Processes(layout, port)
    try:
        processes.start_superlink()
        processes.wait(lambda: processes.logged("superlink", "registering client-1: done"), "both keys registered")
        processes.start_nodes(keep_warm=0)
        yield processes
    finally:
        processes.stop()


@pytest.mark.parametrize("kind", ["no key", "unknown key", "wrong CA", "wrong clock"])
def test_a_node_that_does_not_belong_is_rejected(deployment: Processes, tmp_path: Path, kind: str) -> None:
    """It exits by itself with an error that says why, and never gets a node id."""
    other = DeploymentLayout(tmp_path / "other")
    other.make_folders(1)
    certificates.make_ca(other)
    certificates.make_node_keys(other, range(1))
    certificates.share_ca(other, 1)
    registered, unknown = deployment.layout.client(1), other.client(0)
    ca = unknown.tls / "ca.crt" if kind == "wrong CA" else registered.tls / "ca.crt"
    key = {"no key": None, "unknown key": unknown.key}.get(kind, registered.key)
    name = f"unregistered-{kind.replace(' ', '-')}"
    process = deployment.start_node(name, ca, key, seconds_ahead=180 if kind == "wrong clock" else 0)
    deployment.wait(lambda: process.poll() is not None, "the unregistered node exits")
    assert process.returncode != 0
    reason = {
        "no key": "rejects this node: its key is not, or no longer, in the server's folder of nodes",
        "unknown key": "rejects this node: its key is not, or no longer, in the server's folder of nodes",
        "wrong CA": "certificate verify failed",
        "wrong clock": "s ahead of the server's, and may be at most 5 s ahead of it",
    }[kind]
    if kind == "wrong clock":
        assert deployment.logged(name, '"logger": "copra_fl.deployment.supernode"')
        assert deployment.logged("superlink", "client-1 is rejected: its clock is 1")
    assert deployment.logged(name, reason), deployment.log(name).read_text()
    assert not deployment.logged(name, "SuperNode ID")


def test_control_and_runtime_answer_nobody_without_the_secret(deployment: Processes) -> None:
    """Neither from this machine's network address, as another machine would call, nor from loopback, as a reverse proxy
    on this machine would forward a call. Runtime's routes are all that Flower has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; chooses the address that packets would leave from
        address = probe.getsockname()[0]
    context = ssl.create_default_context(cafile=deployment.layout.tls / "ca.crt")
    context.check_hostname = False  # the certificate is for localhost, not for this address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))

    def answer(host: str, path: str, **headers: str) -> int:
        url = f"https://{host}:{deployment.port}{path}"
        headers |= {"X-Forwarded-For": "127.0.0.1", "Content-Type": "application/protobuf"}
        try:
            with opener.open(urllib.request.Request(url, b"", headers), timeout=HANG_SECONDS) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    paths = [path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet")]
    assert {"/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task"} < set(paths)
    assert {path: answer("127.0.0.1", path) for path in paths} == dict.fromkeys(paths, 401)
    if not address.startswith("127."):
        assert {path: answer(address, path) for path in paths} == dict.fromkeys(paths, 403)
    secret = (deployment.layout.flower_home / operator_secret.NAME).read_text()
    assert answer("127.0.0.1", "/v1/control/list-runs", Authorization=f"Bearer {secret}") == 200
    assert answer("127.0.0.1", "/v1/fleet/pull-messages") == 401


@pytest.fixture(scope="module")
def settings(deployment: Processes, tiny: dict[str, object]) -> dict[str, object]:
    return tiny | {"num-clients": 0, "num-rounds": 3, "rule": "flora", "output": str(deployment.layout.runs / "cold")}


@pytest.fixture(scope="module")
def cold(deployment: Processes, settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on nodes without warm processes."""
    run = deployment.start_run(tmp_path_factory.mktemp("app"), settings)
    printed, _ = run.communicate(timeout=HANG_SECONDS)
    output = Path(str(settings["output"]))
    assert (output / "summary.json").exists(), printed
    return output


def test_a_run_over_two_nodes_ends_in_an_adapter_that_peft_opens(cold: Path, tiny: dict[str, object]) -> None:
    rows = [json.loads(line) for line in (cold / "journal.jsonl").read_text().splitlines()]
    assert [[client["client"] for client in row["clients"]] for row in rows] == [[0, 1]] * 3
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(str(tiny["model"])), str(cold / "adapter"))
    assert any(".lora_" in name for name, _ in encoder.named_parameters())


def test_metrics_and_log_agree_with_the_journal(deployment: Processes, cold: Path) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{deployment.metrics_port}/metrics", timeout=HANG_SECONDS
    ) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    metrics = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert [metrics["copra_fl_node_online", f"client-{number}"] for number in range(2)] == [1, 1]
    journal = (cold / "journal.jsonl").read_text().splitlines()
    last = json.loads(journal[-1])
    assert (metrics["copra_fl_round", "cold"], metrics["copra_fl_finished", "cold"]) == (3, 1)
    assert metrics["copra_fl_validation_accuracy", "cold"] == last["validation"]["accuracy"]

    lines = deployment.log("superlink").read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert {line["process"] for line in logged} >= {"flower-superlink", "flwr-serverapp"}
    rounds = [line for line in logged if "round" in line and "seconds" in line]
    assert [(line["round"], line["bytes_up"]) for line in rounds] == [
        (row["round"], row["bytes_up"]) for row in map(json.loads, journal)
    ]


def test_the_audit_log_names_the_nodes_by_their_keys(deployment: Processes, cold: Path) -> None:
    events, _ = read_records(AuditEvent, [cold.parent / "audit.jsonl"])
    of_run = [event for event in events if event.run == cold.name]
    assert [event.event for event in of_run] == ["started", "admitted", "admitted", "finished"]
    named = {event.node.name: event.node.fingerprint for event in of_run if event.node}
    keys = {name: (deployment.layout.nodes / f"{name}.pub").read_text() for name in ("client-0", "client-1")}
    assert named == {name: fingerprint(key) for name, key in keys.items()}


def test_a_warm_process_answers_all_of_a_run_and_one_that_is_killed_is_replaced(
    deployment: Processes, settings: dict[str, object], cold: Path, tmp_path: Path
) -> None:
    """Node 0's is killed after the first round; the adapter equals the cold run's. Each ends with its node."""
    deployment.start_nodes(keep_warm=600)
    output = deployment.layout.runs / "warm"
    run = deployment.start_run(tmp_path, settings | {"output": str(output)})
    deployment.wait(lambda: (output / "journal.jsonl").exists(), "the first round")
    os.kill(deployment.warm_processes("node-0")[0], signal.SIGKILL)
    printed, _ = run.communicate(timeout=HANG_SECONDS)
    assert (output / "summary.json").exists(), printed
    first, second = [deployment.warm_processes(f"node-{number}") for number in range(2)]
    assert (len(first), len(second)) == (2, 1), printed
    adapters = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (cold, output)]
    assert adapters[0] == adapters[1]
    deployment.start_nodes(keep_warm=0)
    deployment.wait(lambda: not any(map(psutil.pid_exists, (first[1], second[0]))), "the end of warm processes")


def test_a_plugin_and_a_script_reach_real_nodes(
    deployment: Processes, settings: dict[str, object], tiny_llama: str, tmp_path: Path
) -> None:
    """The rule of docs/how-to/plugins.md over Trainers of a script, of which server and nodes have a file each."""
    page = (ROOT / "docs" / "how-to" / "plugins.md").read_text(encoding="utf-8")
    hospital = deployment.plugins / "hospital"
    hospital.mkdir(parents=True)
    rules = re.search(r"^`hospital/rules.py`.*?```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert rules is not None
    (hospital / "rules.py").write_text(rules[1])
    folders = [deployment.layout.root / name / "script" for name in ("server", "node-0", "node-1")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(write_script(tmp_path, tiny_llama, {}), folder / "script.py")
    deployment.start_nodes(0, [f"script-path='{folder / 'script.py'}'" for folder in folders[1:]])
    output = deployment.layout.runs / "scripted"
    changes = {
        "task": "causal-lm", "model": tiny_llama, "target-modules": "q_proj,v_proj", "local-training": "lora",
        "engine": "trainer", "partitioner": "iid", "script": str(folders[0] / "script.py"), "num-rounds": 2,
        "rule": "hospital.rules", "by-loss.sharpness": 2.0,
    }  # fmt: skip
    flat = {key: value for key, value in (settings | changes).items() if key != "output"}
    run_config = Config.from_flat(flat).to_run_config() | {"output": str(output)}
    printed, _ = deployment.start_run(tmp_path / "app", run_config).communicate(timeout=HANG_SECONDS)
    assert (output / "summary.json").exists(), printed
    assert json.loads((output / "summary.json").read_text())["rule"] == "hospital.rules"
    digests = json.loads((output / "provenance.json").read_text())["start"]["plugins"]
    assert digests.keys() == {"hospital.rules", "script"}
    steps = [
        (folder / "rates.txt").read_text().count("\n") if (folder / "rates.txt").exists() else 0 for folder in folders
    ]
    assert steps == [0, 6, 6], "two rounds of three steps by the Trainer of each node, none on the server"
    deployment.start_nodes(keep_warm=0)


def test_removing_a_key_ends_its_node_only_until_the_key_comes_back(deployment: Processes) -> None:
    """The last test of this file, because it disturbs the nodes."""
    key, client = deployment.layout.nodes / "client-1.pub", deployment.layout.client(1)
    text, node = key.read_text(), deployment.started["node-1"]
    key.unlink()
    deployment.wait(lambda: node.poll() is not None, "node 1 is rejected")
    assert deployment.started["node-0"].poll() is None
    key.with_name("site-b.pub").write_text(f"{text.strip()} site b\n")
    deployment.log("node-1").unlink()

    def is_connected() -> bool:
        """Return whether node 1 is; it is restarted as in a container, until Flower counts it as gone."""
        if deployment.started["node-1"].poll() is not None:
            deployment.start_node("node-1", client.tls / "ca.crt", client.key, 1)
        return deployment.logged("node-1", "SuperNode ID")

    deployment.wait(is_connected, "node 1 is admitted again")
    registered = read_registered(deployment.layout.flower_home)
    assert sorted(node.name for node in registered) == ["client-0", "site-b"]
