"""The audit log of a deployment: events of real runs, submissions, and the command that shows them."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from copra_fl.aggregation.compatibility import with_explicit_parameters
from copra_fl.cli import deploy_run
from copra_fl.cli.deploy_run import record_submission
from copra_fl.config import Config
from copra_fl.deployment import registration
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.registration import KNOWN, fingerprint
from copra_fl.files import append_line
from copra_fl.provenance import library_digest
from copra_fl.records import AuditEvent, NodeRecord, read_records
from server import runs
from server.errors import FederationError
from tests.support.command_line import run_command
from tests.support.documents import ROOT
from tests.support.federations import Stop, StoppingGrid
from tests.support.local_grid import LocalGrid
from tests.support.tiny import Settings


def start(grid: LocalGrid, flat: Settings, directory: Path, resume: bool = False) -> None:
    """Start the server app as Flower does."""
    run_config = Config.from_flat(flat).to_flat() | {"output": str(directory), "resume": resume}
    runs.main(grid, Context(1, 1, {}, RecordDict(), run_config))


@pytest.fixture
def key(tmp_path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "node"], check=True)
    return (tmp_path / "node.pub").read_text()


needs_ssh_keygen = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


@needs_ssh_keygen
def test_the_log_names_starts_nodes_reasons_and_ends(
    tiny: Settings, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is killed in its second round and resumed; one of three nodes does not fit, another one has a key."""
    monkeypatch.setenv("COPRA_FL_AUDIT", str(tmp_path / "audit.jsonl"))
    monkeypatch.setenv(registration.VARIABLE, str(tmp_path))
    (tmp_path / KNOWN).write_text(json.dumps({"client-1": {"id": "101", "key": key}}))
    flat = tiny | {"failures": "tolerant"}
    killed = StoppingGrid(3, messages=3)
    killed.contexts[102].node_config["data-path"] = "/data/mine.csv"
    with pytest.raises(Stop):
        start(killed, flat, tmp_path / "run")
    start(LocalGrid(2), flat, tmp_path / "run", resume=True)
    with pytest.raises(FederationError):
        start(LocalGrid(2, node_configs=[{}, {"data-path": "x"}]), tiny, tmp_path / "strict")

    events, num_damaged = read_records(AuditEvent, [tmp_path / "audit.jsonl"])
    assert num_damaged == 0 and [event.event for event in events] == [
        "started", "left out", "admitted", "admitted", "stopped",
        "resumed", "admitted", "admitted", "finished",
        "started", "stopped",
    ]  # fmt: skip
    started, left_out, first, second, stopped, resumed, *_, finished, _, rejected = events
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert {event.run_id for event in (started, first, second, resumed, finished)} == {provenance["run"]}
    assert {event.run for event in events[:9]} == {"run"} and rejected.run == "strict"
    assert started.source_digest == provenance["start"]["source_digest"]
    assert started.config_digest == resumed.config_digest == with_explicit_parameters(Config.from_flat(flat)).digest
    assert first.config_digest == second.config_digest != started.config_digest
    assert "node 102 (partition-id 2) rejected the run: it has its own data" in left_out.reason
    assert "node 101 (partition-id 1) rejected the run: it has its own data" in rejected.reason
    printed = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "node.pub"], capture_output=True, text=True).stdout
    assert first.node is not None and (first.node.id, first.node.partition, first.node.name) == (100, 0, "")
    assert second.node is not None and (second.node.name, second.node.fingerprint) == ("client-1", printed.split()[1])
    assert stopped.reason == "Stop" and finished.rounds == 2
    assert [event.time for event in events] == sorted(event.time for event in events)


def test_without_the_variable_nothing_is_written(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COPRA_FL_AUDIT", raising=False)
    start(LocalGrid(1), tiny | {"num-rounds": 1}, tmp_path / "run")
    assert not list(tmp_path.rglob("audit*"))


def test_a_submission_is_recorded_outside_of_every_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the digest that the server app computes from the settings it gets."""
    run_command("deploy", "init", tmp_path / "d")
    layout, config = DeploymentLayout.open(tmp_path / "d"), Config.from_flat({"rule": "trimmed-mean"})
    monkeypatch.setattr("sys.argv", ["/usr/bin/copra-fl", "deploy", "run", "my recipe.toml", "d"])
    monkeypatch.delenv("SUDO_USER", raising=False)
    record_submission(layout, config, "run-1")
    (event,), _ = read_records(AuditEvent, [tmp_path / "d" / "audit.jsonl"])
    assert (event.event, event.run, event.host) == ("submitted", "run-1", socket.gethostname())
    assert event.command == "copra-fl deploy run 'my recipe.toml' d"
    assert event.config_digest == with_explicit_parameters(Config.from_flat(config.to_flat())).digest
    assert event.source_digest == library_digest(ROOT / "clients")
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert event.user == deploy_run.user_name() != getpass.getuser()
    monkeypatch.setenv("SUDO_USER", "alice")
    assert deploy_run.user_name() == (f"{event.user} (sudo by alice)" if os.getuid() == 0 else event.user)


def test_the_command_shows_both_logs_in_order_and_survives_damage(tmp_path: Path) -> None:
    run_command("deploy", "init", tmp_path / "d")
    layout = DeploymentLayout.open(tmp_path / "d")
    assert "the audit log is empty" in run_command("deploy", "audit", tmp_path / "d").out
    submissions, of_server = layout.audit_logs

    def write(path: Path, second: int, event: str, **fields: object) -> None:
        record = {"time": f"2026-11-28T00:00:0{second}.000+00:00", "event": event, "run": "night", **fields}
        append_line(path, AuditEvent.model_validate(record).to_json())

    write(submissions, 1, "submitted", user="alice", host="fl", command="copra-fl deploy run", config_digest="abc" * 9)
    of_server.write_text('{"time": "2026-11-28T00')
    write(of_server, 2, "started")
    write(of_server, 4, "stopped", reason="\x1b[2Jno [bold]space")
    write(submissions, 3, "submitted", user="bob", host="fl", command="copra-fl deploy run --resume")
    shown = run_command("deploy", "audit", tmp_path / "d", "--json")
    assert "1 damaged lines are left out" in shown.err
    listed = json.loads(shown.out)
    assert [event["event"] for event in listed] == ["submitted", "started", "submitted", "stopped"]
    assert listed[0]["config_digest"] == "abc" * 9 and set(listed[0]) == set(AuditEvent.model_fields)
    table = run_command("deploy", "audit", tmp_path / "d").out
    for text in ("2026-11-28 00:00:01", "abcabcabcabc", "alice on fl", "[bold]space"):
        assert text in " ".join(table.split()) or text in table.replace("\n", ""), table
    assert "\x1b" not in table and "abc" * 5 not in table
    of_server.rename(tmp_path / "elsewhere")
    for replaced in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        replaced(of_server)
        assert len(json.loads(run_command("deploy", "audit", tmp_path / "d", "--json").out)) == 2, "it is no file"
        of_server.unlink()


def test_the_command_shows_the_log_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run_command("deploy", "init", tmp_path / "d")
    client = DeploymentLayout.open(tmp_path / "d").client(1)
    client.audit.mkdir()
    for name, number in (("audit.jsonl", 2), ("audit.1.jsonl", 1)):
        record = NodeRecord(
            time=f"2026-11-28T00:00:0{number}.000+00:00", kind="train", flower_run=7, config_digest="c" * 64, run="r",
            round=number, clients=(1,), examples=40, decision="rejected", reason="client policy: no", bytes_down=5000,
        )  # fmt: skip
        append_line(client.audit / name, record.to_json())
    listed = json.loads(run_command("deploy", "audit", client.root, "--json").out)
    assert [record["round"] for record in listed] == [1, 2] and listed[0]["examples"] == 40
    table = run_command("deploy", "audit", client.root).out
    assert "0.005" in table and "train, round 2" in " ".join(table.split()) and "rejected" in table, table


@needs_ssh_keygen
def test_a_fingerprint_is_that_of_ssh_keygen(key: str, tmp_path: Path) -> None:
    printed = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "node.pub"], capture_output=True, text=True).stdout
    assert fingerprint(key) == printed.split()[1] and fingerprint("") == ""
