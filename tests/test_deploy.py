"""`copra-fl deploy init`: keys and certificates, read with openssl and ssh-keygen, and compose files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from copra_fl.cli.deploy_run import certificate_warnings
from copra_fl.config import ConfigError
from copra_fl.deployment import certificates
from copra_fl.deployment.compose import GPU_NAME, NAME
from copra_fl.deployment.metrics import of_certificates
from copra_fl.deployment.nodes import wait_until_online
from copra_fl.deployment.options import DeploymentOptions, check_host
from copra_fl.secure_aggregation.keys import normal_identity, public_identity
from copra_fl.simulation.superlink import RunFailed
from tests.support.command_line import run_command
from tests.support.node_files import listed

ROOT = Path(__file__).parent.parent
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
needs_ssh_keygen = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


def init(directory: Path, *options: str) -> str:
    """Run `copra-fl deploy init`; return what it prints."""
    return run_command("deploy", "init", directory, *options).err


def services_in(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["services"]


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment of three clients, with a name and an address for the server."""
    directory = tmp_path_factory.mktemp("deploy") / "deployment"
    init(directory, "--clients", "3", "--host", "fl.example.org", "--host", "10.1.2.3", "--port", "8443")
    return directory


@needs_openssl
def test_the_certificate_is_signed_by_the_ca_for_every_host(deployment: Path) -> None:
    tls = deployment / "server" / "tls"
    verify = ("openssl", "verify", "-x509_strict", "-purpose", "sslserver")
    files = ("-CAfile", tls / "ca.crt", tls / "server.crt")
    for check in (
        ["-verify_hostname", "superlink"],
        ["-verify_hostname", "localhost"],
        ["-verify_hostname", "fl.example.org"],
        ["-verify_ip", "10.1.2.3"],
        ["-verify_ip", "127.0.0.1"],
    ):
        output_of(*verify, *check, *files)
    with pytest.raises(subprocess.CalledProcessError):
        output_of(*verify, "-verify_hostname", "evil.org", *files)


@needs_ssh_keygen
def test_the_server_has_the_public_key_of_each_client(deployment: Path) -> None:
    publics = []
    for number in range(3):
        derived = output_of("ssh-keygen", "-y", "-f", deployment / f"clients/client-{number}/tls/node.key")
        stored = (deployment / f"server/nodes/client-{number}.pub").read_text()
        assert derived.split()[:2] == stored.split()[:2] and derived.startswith("ecdsa-sha2-nistp384")
        publics.append(stored)
    assert len(set(publics)) == 3
    signing = [
        output_of("ssh-keygen", "-y", "-f", deployment / f"clients/client-{number}/tls/peer.key").split()[1]
        for number in range(3)
    ]
    assert not set(signing) & {public.split()[1] for public in publics}, "code of a run can read it: a key of its own"
    for client in (deployment / "clients").iterdir():
        assert [path.read_text().split()[1] for path in sorted((client / "peers").iterdir())] == signing


@needs_ssh_keygen
def test_a_client_can_make_its_keys_itself(tmp_path: Path) -> None:
    """As docs/how-to/deploy.md says: the server gets the public keys only, and gives them to the other clients."""
    directory, machine = tmp_path / "d", tmp_path / "client-0"
    init(directory)
    machine.mkdir()
    for key, folder in (("node.key", "nodes"), ("peer.key", "peers")):
        output_of("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "ours", "-f", machine / key)
        (directory / "clients/client-0/tls" / key).unlink()
        shutil.copy(machine / f"{key}.pub", directory / f"server/{folder}/client-0.pub")
    init(directory)
    assert [path.name for path in (directory / "clients/client-0/tls").iterdir()] == ["ca.crt"]
    own = (machine / "peer.key.pub").read_bytes()
    for number in range(2):
        assert (directory / f"clients/client-{number}/peers/client-0.pub").read_bytes() == own
    assert normal_identity(own) == public_identity((machine / "peer.key").read_bytes())
    assert (directory / "server/nodes/client-0.pub").read_text() == (machine / "node.key.pub").read_text()


def test_only_the_owner_can_read_private_keys(deployment: Path) -> None:
    for path in deployment.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix == ".key":
            assert mode == 0o600, path
    assert len(list(deployment.rglob("*.key"))) == 8, "CA, server, three nodes with two keys"
    mounted = [path for folder in (*deployment.glob("clients/*/*/"), *deployment.glob("server/*/"))
               for path in (folder, *folder.rglob("*"))]  # fmt: skip
    assert len(mounted) > 20
    assert {path.stat().st_uid for path in mounted} == {os.getuid() or 10001}, (
        "containers run as another user than root"
    )
    assert (deployment / "ca.key").stat().st_uid == os.getuid()


def test_each_container_mounts_its_own_keys_and_none_the_ca_s(deployment: Path) -> None:
    services = services_in(deployment / NAME)
    assert sorted(services) == ["client-0", "client-1", "client-2", "superlink"]
    for name, service in services.items():
        mounted = [volume.split(":-./deployment}/")[1].split(":")[0] for volume in service["volumes"]]
        allowed = ("server/", "runs") if name == "superlink" else (f"clients/{name}/",)
        assert mounted and all(path.startswith((*allowed, "assets")) for path in mounted), (name, mounted)
        writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
        assert {volume.split(":")[-1] for volume in writable} <= {"/state", "/runs"}
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    nodes = [word for number in range(3) for word in services[f"client-{number}"]["command"] if "partition-id" in word]
    assert [word.split()[0] for word in nodes] == [f"--node-config=partition-id={number}" for number in range(3)]


def test_a_client_s_folder_runs_alone_on_another_machine(deployment: Path) -> None:
    (service,) = services_in(deployment / "clients/client-2" / NAME).values()
    assert "--superlink=fl.example.org:8443" in service["command"] and "build" not in service
    mounted = {"./tls", "./peers", "./data", "./policy", "./state"}
    assert {volume.split(":")[0] for volume in service["volumes"]} == mounted
    assert "networks" not in service, "it must reach the server over the network of its machine"
    assert (deployment / "clients/client-2/.env").read_text() == "COPRA_FL_CLIENTS=3\n"


def test_two_clients_are_the_compose_file_of_the_repository(tmp_path: Path) -> None:
    init(tmp_path / "two")
    assert services_in(tmp_path / "two" / NAME) == services_in(ROOT / NAME)
    assert services_in(tmp_path / "two" / GPU_NAME) == services_in(ROOT / GPU_NAME)


def test_each_client_gets_a_different_gpu(deployment: Path) -> None:
    gpus = []
    for service in services_in(deployment / GPU_NAME).values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        gpus += device["device_ids"]
    assert gpus == ["0", "1", "2"]


def test_init_repeated_keeps_keys_and_registers_as_many_clients_as_asked(tmp_path: Path) -> None:
    """New clients get keys; removed clients lose theirs; a client with its key on another machine stays registered."""
    directory = tmp_path / "d"
    init(directory, "--clients", "2")
    kept = ("ca.key", "server/tls/ca.crt", "clients/client-0/tls/node.key", "server/nodes/client-1.pub")
    before = {name: (directory / name).read_bytes() for name in kept}
    (directory / "clients/client-1/tls/node.key").unlink()
    with open(directory / ".env", "a") as file:
        file.write('COPRA_FL_CLIENT_0=data-path="/data/mine.csv"\n')
    init(directory, "--clients", "3")
    assert {name: (directory / name).read_bytes() for name in kept} == before
    assert not (directory / "clients/client-1/tls/node.key").exists()
    settings = (directory / ".env").read_text()
    assert "COPRA_FL_CLIENTS=3\n" in settings and 'COPRA_FL_CLIENT_0=data-path="/data/mine.csv"\n' in settings
    refused = run_command("deploy", "init", directory, "--clients", "1", code=2).message
    assert "removes the keys of client-1 and client-2" in refused and "--yes" in refused
    assert len(list((directory / "server/nodes").iterdir())) == 3, "without a terminal, only --yes removes a key"
    init(directory, "--clients", "1", "--yes")
    for folder in ("server/nodes", "server/peers", "clients/client-0/peers"):
        assert [path.name for path in (directory / folder).iterdir()] == ["client-0.pub"]


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_init_repeated_changes_what_it_is_told_and_nothing_else(tmp_path: Path) -> None:
    """Metrics are added to a deployment with a name, a port, changed limits and a client that was shut out."""
    directory = tmp_path / "d"
    init(directory, "--clients", "3", "--host", "fl.example.org", "--port", "9000")
    (directory / "server/nodes/client-1.pub").unlink()
    (directory / "ca.key").rename(tmp_path / "ca.key")  # its safe place
    settings = (directory / ".env").read_text()
    (directory / ".env").write_text(settings.replace("COPRA_FL_CLIENT_MEMORY=", "COPRA_FL_CLIENT_MEMORY=99g#"))
    before = content_of(directory)
    init(directory)
    assert content_of(directory) == before
    assert (
        "COPRA_FL_LISTEN=0.0.0.0:9000\n" in settings
        and "COPRA_FL_CLIENT_MEMORY=99g" in (directory / ".env").read_text()
    )
    init(directory, "--metrics-port", "9464")
    after = content_of(directory)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"deployment.toml", "docker-compose.yml"}
    superlink = services_in(directory / NAME)["superlink"]
    assert superlink["ports"][1:] == ["127.0.0.1:9464:9464"]
    assert (
        "--superlink=fl.example.org:9000" in services_in(directory / "clients/client-2" / NAME)["client-2"]["command"]
    )
    message = run_command("deploy", "init", directory, "--host", "other.example.org", code=2).message
    assert "needs the key of the CA" in message
    (tmp_path / "ca.key").rename(directory / "ca.key")
    assert "restart superlink" in init(directory, "--host", "", "--metrics-port", "0")
    assert "COPRA_FL_LISTEN=127.0.0.1:9000\n" in (directory / ".env").read_text()
    assert len(services_in(directory / NAME)["superlink"]["ports"]) == 1


@needs_openssl
def test_a_new_ca_follows_the_removal_of_the_old_one(tmp_path: Path) -> None:
    """The steps after the theft of the server's or the CA's key, from docs/how-to/operate.md."""
    directory, tls = tmp_path / "d", tmp_path / "d" / "server" / "tls"
    init(directory, "--host", "fl.example.org")
    before = content_of(directory)
    (directory / "ca.key").unlink()
    (tls / "ca.crt").unlink()
    assert "restart superlink" in init(directory)
    output_of("openssl", "verify", "-verify_hostname", "fl.example.org", "-CAfile", tls / "ca.crt", tls / "server.crt")
    after = content_of(directory)
    assert {name for name in before if before[name] != after[name]} == {
        "ca.key", "server/tls/ca.crt", "server/tls/server.crt", "server/tls/server.key",
        "clients/client-0/tls/ca.crt", "clients/client-1/tls/ca.crt",
    }  # fmt: skip


@pytest.mark.parametrize(
    "host", ["evil;rm", "a b", "x/y", "", " ", "fl.example.org:9000", "https://fl.example.org", "-x.org", "10.1.2.300",
             "a..b", "x" * 64, "$(id)", "exämple.org", "a\nb"]
)  # fmt: skip
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name like fl.example.org nor an IP address"):
        check_host(host)


def test_hosts_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    assert [check_host(host) for host in ("superlink", "fl.example.org", "10.1.2.3", "fd00::0:1")] == [
        "superlink", "fl.example.org", "10.1.2.3", "fd00::1"
    ]  # fmt: skip
    assert "--host 'evil;rm'" in run_command("deploy", "init", tmp_path / "d", "--host", "evil;rm", code=2).message
    assert not (tmp_path / "d").exists()
    assert DeploymentOptions(hosts=("fd00::1",)).server == "[fd00::1]:8000"


@needs_openssl
@needs_ssh_keygen
def test_rotate_replaces_a_certificate_or_the_keys_of_a_client(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    init(directory, "--host", "fl.example.org")
    before = content_of(directory)
    message = run_command("deploy", "rotate", directory, "--certificate").err
    assert "new certificate for 824 days" in message and "restart superlink" in message
    rotated = content_of(directory)
    assert {name for name in before if before[name] != rotated[name]} == {
        "server/tls/server.key",
        "server/tls/server.crt",
    }
    tls = directory / "server/tls"
    output_of("openssl", "verify", "-verify_hostname", "fl.example.org", "-CAfile", tls / "ca.crt", tls / "server.crt")
    message = run_command("deploy", "rotate", directory, "--node", "client-1").err
    assert "restart client-1" in message and "copy the folder `peers`" in message
    last = content_of(directory)
    pairs = {
        "clients/client-1/tls/node.key": ["server/nodes/client-1.pub"],
        "clients/client-1/tls/peer.key": [
            f"{folder}/client-1.pub" for folder in ("server/peers", "clients/client-0/peers", "clients/client-1/peers")
        ],
    }
    assert {name for name in before if rotated[name] != last[name]} == {*pairs, *itertools.chain(*pairs.values())}
    for key, copies in pairs.items():
        public = output_of("ssh-keygen", "-y", "-f", directory / key).split()[:2]
        assert all(last[copy].decode().split()[:2] == public for copy in copies)
    for options, reason in (
        ([], "name what to replace"),
        (["--node", "client-2"], "unknown node 'client-2'"),
        (["--node", "client-0", "--node", "../x"], "unknown node '../x'"),
    ):
        assert reason in run_command("deploy", "rotate", directory, *options, code=2).message
    assert content_of(directory) == last


def test_a_certificate_that_ends_soon_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CA of 40 days, which its server's certificate does not outlive, which the metric counts in seconds."""
    monkeypatch.setattr(certificates, "CA_DAYS", 40)
    init(tmp_path / "d")
    tls = tmp_path / "d" / "server" / "tls"
    assert certificates.days_left(tls) == {"server": 39, "ca": 39}
    server, ca = certificate_warnings(certificates.days_left(tls), tmp_path / "d")
    assert "certificate of the server ends in 39 days: copra-fl deploy rotate" in server and "of the CA ends" in ca
    assert list(certificate_warnings({"server": 60, "ca": 61}, tmp_path)) == []
    (late,) = certificate_warnings({"server": -1}, tmp_path)
    assert "has ended" in late
    metric = of_certificates(certificates.ends(tls), datetime.now(UTC) + timedelta(days=41))
    assert all(-86_500 < sample.value <= -86_400 for sample in metric.samples) and len(metric.samples) == 2


def test_every_container_is_limited_and_clients_reach_the_server_alone() -> None:
    document = yaml.safe_load((ROOT / NAME).read_text())
    for name, service in document["services"].items():
        assert service["mem_limit"] and service["cpus"] and service["pids_limit"] == 2048, name
        assert service["tmpfs"] == ["/tmp:size=${COPRA_FL_TMP:-1g}"]
        assert service["logging"]["options"] == {"max-size": "20m", "max-file": "5"}
        assert "--hide-keys" in service["command"]
        assert service["networks"] == (["clients", "outside"] if name == "superlink" else ["clients"])
    assert document["networks"]["clients"] == {"internal": True}


def test_insecure_removes_tls_and_keys_completely(tmp_path: Path) -> None:
    assert "nothing is encrypted" in init(tmp_path / "open", "--insecure")
    assert not list((tmp_path / "open").rglob("*.key"))
    services = services_in(tmp_path / "open" / NAME)
    for service in services.values():
        assert "--insecure" in service["command"] and "https" not in str(service["healthcheck"])
        assert service["build"] == services_in(ROOT / NAME)["superlink"]["build"], "packages still come over TLS"
        assert not any(word in str(service["command"]) for word in ("ssl", "auth", "certificates", "node-key", "peers"))
    secure = services_in(ROOT / NAME)
    assert not any("--insecure" in service["command"] for service in secure.values())


def test_a_folder_with_other_files_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds no deployment" in run_command("deploy", "init", tmp_path, code=2).message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert f"copra-fl deploy init {tmp_path}" in run_command("deploy", "status", tmp_path, code=2).message


def test_waiting_for_nodes_ends_with_the_reason(tmp_path: Path) -> None:
    def silent(*command: str) -> str:
        raise subprocess.CalledProcessError(1, command)

    def one_online(*command: str) -> str:
        return json.dumps({"success": True, "nodes": [listed("17", "online")]})

    for answer, reason in ((silent, "the SuperLink does not answer"), (one_online, "fewer than 2 nodes are online")):
        layout = SimpleNamespace(root=tmp_path, flower_home=tmp_path / "none")
        compose_command: Any = SimpleNamespace(run_in_superlink=answer, layout=layout)
        with pytest.raises(RunFailed, match=f"{reason}.*copra-fl deploy logs {tmp_path}"):
            wait_until_online(compose_command, 2, timeout_s=0)


def test_an_interrupted_question_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input ends at the question, as with Ctrl-D; click treats Ctrl-C alike."""
    init(tmp_path / "d")
    before = content_of(tmp_path / "d")
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("copra_fl.cli.deploy.sys", terminal)
    message = run_command("deploy", "init", tmp_path / "d", "--clients", "1", code=130).message
    assert message.endswith("copra-fl: nothing was changed") and content_of(tmp_path / "d") == before
