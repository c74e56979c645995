"""`copra-fl deploy init`: keys, certificates and compose files, checked with openssl, ssh-keygen and by their form."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from copra_fl.cli import app
from copra_fl.cli.deploy_run import choose_name, read_runs
from copra_fl.config import ConfigError
from copra_fl.deployment.compose import GPU_NAME, NAME
from copra_fl.deployment.layout import Folder
from tests.support.run_folders import write_run

ROOT = Path(__file__).parent.parent
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here to read certificates with")
needs_ssh_keygen = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen here to read keys with")


def init(directory: Path, *options: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["deploy", "init", str(directory), *options])
    assert result.exit_code == code, result.output
    return result.output


def compose(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["services"]


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment of three clients whose server has a name and an address."""
    directory = tmp_path_factory.mktemp("deploy") / "three"
    init(directory, "--clients", "3", "--host", "fl.example.org", "--host", "10.1.2.3", "--port", "8443")
    return directory


@needs_openssl
def test_the_certificate_is_the_ca_s_and_has_every_name(three: Path) -> None:
    tls = three / "server" / "tls"
    verify = ("openssl", "verify", "-x509_strict", "-purpose", "sslserver")
    files = ("-CAfile", tls / "ca.crt", tls / "server.crt")
    for check in (
        ["-verify_hostname", "superlink"],
        ["-verify_hostname", "localhost"],
        ["-verify_hostname", "fl.example.org"],
        ["-verify_ip", "10.1.2.3"],
        ["-verify_ip", "127.0.0.1"],
    ):
        said(*verify, *check, *files)
    with pytest.raises(subprocess.CalledProcessError):
        said(*verify, "-verify_hostname", "evil.org", *files)


@needs_ssh_keygen
def test_each_client_has_a_key_of_its_own_whose_public_half_the_server_has(three: Path) -> None:
    publics = []
    for number in range(3):
        derived = said("ssh-keygen", "-y", "-f", three / f"clients/client-{number}/tls/node.key")
        stored = (three / f"server/nodes/client-{number}.pub").read_text()
        assert derived.split()[:2] == stored.split()[:2] and derived.startswith("ecdsa-sha2-nistp384")
        publics.append(stored)
    assert len(set(publics)) == 3


def test_nobody_else_can_read_private_keys(three: Path) -> None:
    for path in three.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix == ".key":
            assert mode == 0o600, path
    assert len(list(three.rglob("*.key"))) == 5, "CA, server, three nodes"
    owners = {path.stat().st_uid for path in (three / "clients").rglob("*")}
    assert owners == {os.getuid() or 10001}, "containers run as another user than root"


def test_the_private_keys_are_mounted_where_they_belong_and_the_ca_s_nowhere(three: Path) -> None:
    services = compose(three / NAME)
    assert sorted(services) == ["client-0", "client-1", "client-2", "superlink"]
    for name, service in services.items():
        mounted = [volume.split(":-./deployment}/")[1].split(":")[0] for volume in service["volumes"]]
        own = ("server/", "runs") if name == "superlink" else (f"clients/{name}/",)
        assert mounted and all(path.startswith(own) for path in mounted), (name, mounted)
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    nodes = [word for number in range(3) for word in services[f"client-{number}"]["command"] if "partition-id" in word]
    assert [word.split()[0] for word in nodes] == [f"--node-config=partition-id={number}" for number in range(3)]


def test_a_client_s_folder_runs_alone_on_another_machine(three: Path) -> None:
    (service,) = compose(three / "clients/client-2" / NAME).values()
    assert "--superlink=fl.example.org:8443" in service["command"] and "build" not in service
    assert {volume.split(":")[0] for volume in service["volumes"]} == {"./tls", "./data", "./state"}
    assert (three / "clients/client-2/.env").read_text() == "COPRA_FL_CLIENTS=3\n"


def test_two_clients_are_the_compose_file_of_the_repository(tmp_path: Path) -> None:
    init(tmp_path / "two")
    assert compose(tmp_path / "two" / NAME) == compose(ROOT / NAME)
    assert compose(tmp_path / "two" / GPU_NAME) == compose(ROOT / GPU_NAME)


def test_each_client_gets_a_gpu_of_its_own(three: Path) -> None:
    gpus = []
    for service in compose(three / GPU_NAME).values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        gpus += device["device_ids"]
    assert gpus == ["0", "1", "2"]


def test_repeated_it_keeps_keys_and_lets_in_who_is_counted(tmp_path: Path) -> None:
    """More clients get new keys; fewer are shut out; a client whose key has moved away is still known."""
    directory = tmp_path / "d"
    init(directory, "--clients", "2")
    keep = ("ca.key", "server/tls/ca.crt", "clients/client-0/tls/node.key", "server/nodes/client-1.pub")
    before = {name: (directory / name).read_bytes() for name in keep}
    (directory / "clients/client-1/tls/node.key").unlink()
    with open(directory / ".env", "a") as file:
        file.write('COPRA_FL_CLIENT_0=data-path="/data/mine.csv"\n')
    init(directory, "--clients", "3")
    assert {name: (directory / name).read_bytes() for name in keep} == before
    assert not (directory / "clients/client-1/tls/node.key").exists()
    settings = (directory / ".env").read_text()
    assert "COPRA_FL_CLIENTS=3\n" in settings and 'COPRA_FL_CLIENT_0=data-path="/data/mine.csv"\n' in settings
    init(directory, "--clients", "1")
    assert [path.name for path in (directory / "server/nodes").iterdir()] == ["client-0.pub"]


def test_insecure_takes_a_word_and_leaves_no_half_of_it(tmp_path: Path) -> None:
    assert "nothing is encrypted" in init(tmp_path / "open", "--insecure")
    assert not list((tmp_path / "open").rglob("*.key"))
    services = compose(tmp_path / "open" / NAME)
    for service in services.values():
        assert "--insecure" in service["command"]
        assert not any("ssl" in word or "auth" in word or "certificates" in word for word in service["command"])
    secure = compose(ROOT / NAME)
    assert not any("--insecure" in service["command"] for service in secure.values())


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = CliRunner().invoke(app, ["deploy", "init", str(tmp_path)])
    assert result.exit_code != 0 and "holds no deployment" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    result = CliRunner().invoke(app, ["deploy", "status", str(tmp_path)])
    assert "copra-fl deploy init" in str(result.exception)


def test_a_run_has_a_plain_name_and_is_never_begun_twice(tmp_path: Path) -> None:
    init(tmp_path / "d")
    folder = Folder.open(tmp_path / "d")
    for name in ("../elsewhere", "a/b", ".."):
        with pytest.raises(ConfigError, match="is a path"):
            choose_name(folder, name, resume=False)
    with pytest.raises(ConfigError, match="no run to resume"):
        choose_name(folder, None, resume=True)
    for age, name in ((20, "older"), (10, "newer")):
        (folder.runs / name / "checkpoints").mkdir(parents=True)
        (folder.runs / name / "config.toml").write_text("num-rounds = 3\n")
        os.utime(folder.runs / name / "config.toml", (1e9 - age, 1e9 - age))
    assert choose_name(folder, None, resume=True) == "newer"
    assert choose_name(folder, "older", resume=True) == "older"
    with pytest.raises(ConfigError, match="--resume goes on with it"):
        choose_name(folder, "older", resume=False)
    assert choose_name(folder, None, resume=False) not in ("older", "newer")


def test_status_reads_the_progress_of_runs_from_their_journals(tmp_path: Path) -> None:
    """A run without a round, one without evaluation that is writing its next line, one of another version."""
    init(tmp_path / "d")
    folder = Folder.open(tmp_path / "d")
    (folder.runs / "new").mkdir()
    (folder.runs / "new" / "config.toml").write_text("num-rounds = 3\n")
    write_run(folder.runs / "running", "fedsa-lora", seed=1, num_rounds=2, finished=False)
    with (folder.runs / "running" / "journal.jsonl").open("a") as journal:
        journal.write('{"round": 3, "sec')
    write_run(folder.runs / "finished", "lora", seed=0)
    write_run(folder.runs / "old", "lora", seed=0)
    (folder.runs / "old" / "provenance.json").write_text('{"seeds": {"root": 0}}')
    for age, name in enumerate(("old", "finished", "running", "new")):
        os.utime(folder.runs / name / "config.toml", (1e9 + age, 1e9 + age))
    old, finished, running, new = read_runs(folder)
    assert (old["run"], old["round"]) == ("old", "unreadable")
    assert (finished["round"], finished["accuracy"], finished["finished"]) == ("3/3", 0.3872, True)
    assert running == {
        "run": "running", "round": "2/2", "clients": 7, "missing": "5", "accuracy": "", "finished": False
    }  # fmt: skip
    assert (new["round"], new["clients"], new["finished"]) == ("0/3", 0, False)
