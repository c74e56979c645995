"""A real deployment in containers, made by `copra-fl deploy init` and `up`, and operations of tests on it.

COPRA_FL_IMAGE names an existing image to test; without it the image is built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from copra_fl.simulation.superlink import free_port
from tests.support.real_runs import HANG_SECONDS, SCRIPT
from tests.support.tiny import Settings

ENGINE = next((name for name in ("docker", "podman") if shutil.which(name)), None)
NUM_CLIENTS = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "containers" in item.path.parts:
            item.add_marker(pytest.mark.containers)
            if ENGINE is None:
                item.add_marker(pytest.mark.skip(reason="neither docker nor podman is installed"))


@dataclass
class Containers:
    """A running deployment: its folder, and its containers by service name."""

    root: Path

    def deploy(self, *arguments: str, code: int = 0) -> str:
        """Run `copra-fl deploy ARGUMENTS`; return its standard output."""
        result = subprocess.run([SCRIPT, "deploy", *arguments], capture_output=True, text=True, timeout=HANG_SECONDS)
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout

    def start_run(self, name: str, settings: Settings, *options: str) -> subprocess.Popen[str]:
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        command = [SCRIPT, "deploy", "run", "base", str(self.root), *sets, "--output", name, *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, run: subprocess.Popen[str], code: int = 0) -> str:
        out, _ = run.communicate(timeout=HANG_SECONDS)
        assert run.returncode == code, out
        return out

    def engine(self, *arguments: str) -> str:
        assert ENGINE is not None
        return subprocess.run([ENGINE, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    def container(self, service: str) -> str:
        """Return the id of a service's container."""
        label = "com.docker.compose.service"
        project = f"label=com.docker.compose.project={self.root.name}"
        return self.engine("ps", "-aq", "--filter", project, "--filter", f"label={label}={service}")

    def kill(self, service: str) -> None:
        """Send SIGKILL from outside, as the kernel does when memory is short; Docker does not know of it."""
        pid = self.engine("inspect", "--format", "{{.State.Pid}}", self.container(service))
        subprocess.run(["kill", "-9", pid], check=True)

    def num_unanswered(self, service: str) -> int:
        """Number of trainings that a client's container began without a reply; a kill leaves it higher."""
        assert ENGINE is not None
        ran = subprocess.run([ENGINE, "logs", self.container(service)], capture_output=True, text=True, check=True)
        log = ran.stdout + ran.stderr
        return log.count("Receiving: train message") - log.count("Sending: train message")

    def kill_while_training(self, service: str, num_unanswered: int) -> None:
        """Kill a client between a train message and its reply; one that has replied first is killed again.

        `num_unanswered` is that of its container before the run.
        """
        while True:
            self.wait(lambda: self.num_unanswered(service) > num_unanswered, f"{service} trains")
            self.kill(service)
            if self.num_unanswered(service) > num_unanswered:
                return

    def network(self) -> str:
        """Return the network of the clients."""
        return self.engine(
            "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}",
            self.container("client-0"),
        )  # fmt: skip

    def in_container(self, service: str, *command: str) -> str:
        """Run `command` in a service's container; return its output, and an error's text in place of it."""
        assert ENGINE is not None
        ran = subprocess.run([ENGINE, "exec", self.container(service), *command], capture_output=True, text=True)
        return ran.stdout + ran.stderr

    def rounds(self, name: str) -> list[str]:
        journal = self.root / "runs" / name / "journal.jsonl"
        return journal.read_text().splitlines() if journal.exists() else []

    @staticmethod
    def wait(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited {HANG_SECONDS} s for: {what}"
            time.sleep(0.5)


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, texts: str) -> Iterator[Containers]:
    """Three clients and a server, connected, with the tiny model and the texts in their data folders."""
    root = tmp_path_factory.mktemp("deployment")
    root = root.rename(root.with_name(f"copra-fl-test-{os.getpid()}"))
    containers = Containers(root)
    containers.deploy("init", str(root), "--clients", str(NUM_CLIENTS), "--port", str(free_port()))
    for data in [root / "server" / "data", *root.glob("clients/*/data")]:
        shutil.copytree(tiny_model, data / "tiny-bert")
        shutil.copy(texts, data / "texts.csv")
        subprocess.run(["chmod", "-R", "a+rX", data], check=True)
    try:
        build = "--no-build" if os.environ.get("COPRA_FL_IMAGE") else "--build"
        containers.deploy("up", str(root), build, "--wait", str(HANG_SECONDS))
        yield containers
    finally:
        containers.deploy("down", str(root))


@pytest.fixture(scope="session")
def settings(tiny: Settings) -> Settings:
    """Settings of three rounds of the tiny federation, with the paths of model and data in the containers."""
    inside = {"model": "/data/tiny-bert", "dataset": "/data/texts.csv", "num-rounds": 3, "partitioner": "iid"}
    return {key: value for key, value in tiny.items() if key != "num-clients"} | inside


@pytest.fixture(scope="session")
def undisturbed(deployment: Containers, settings: Settings) -> Path:
    """Folder of a run of three rounds without any fault."""
    deployment.finish(deployment.start_run("undisturbed", settings))
    return deployment.root / "runs" / "undisturbed"
