"""Registration of node keys: the gate admits the keys whose files are there, whatever happens to files and disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from copra_fl.deployment import registration
from copra_fl.deployment.nodes import parse_nodes
from copra_fl.secure_aggregation.keys import new_identity, normal_identity, public_identity
from tests.support.node_files import listed


class Registration:
    """`keep_registered` beside a Flower that, like the real one, registers each key once and never again.

    Attributes:
        folder: the folder of key files.
        flower: node id -> key of the nodes that Flower has registered.
        admitted: the keys that the gate was given after each poll, name -> key.
        fails: Flower's commands that fail.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "nodes"
        self.folder.mkdir()
        self.flower: dict[str, str] = {}
        self.admitted: list[dict[str, str]] = []
        self.fails: set[str] = set()
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("FLWR_HOME", str(folder))
        monkeypatch.setenv(registration.VARIABLE, str(folder))
        monkeypatch.setattr(registration, "flwr", self._flwr)

    def _flwr(self, command: str, *arguments: str) -> dict[str, Any]:
        if command in self.fails:
            raise OSError("cannot start a process")
        assert command == "register", "a key that was unregistered cannot be registered again"
        key = normal(Path(arguments[0]).read_text())
        assert key not in self.flower.values(), "Public key already in use."
        self.flower[node := str(len(self.flower) + 10)] = key
        return {"success": True, "node-id": int(node)}

    def follow(self, steps: Iterator[None]) -> None:
        """Poll the folder after each of `steps`, which stand for the pauses between two polls, and until they end."""
        pause = SimpleNamespace(sleep=lambda seconds: next(steps))
        self._monkeypatch.setattr(registration, "time", pause)
        keys: Any = SimpleNamespace(replace=self.admitted.append)
        with pytest.raises(StopIteration):
            registration.keep_registered(self.folder, keys)

    def write(self, name: str, key: str) -> None:
        (self.folder / f"{name}.pub").write_text(key)

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.pub").unlink()


def normal(key: str) -> str:
    return normal_identity(key.encode()).decode()


def new_key() -> str:
    """Return a new public key, as in a .pub file without comment."""
    return public_identity(new_identity()).decode()


def test_no_unreadable_key_file_and_no_error_ends_the_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = Registration(tmp_path, monkeypatch)
    folder, admitted = deployment.folder, deployment.admitted
    keys = {name: new_key() for name in "abc"}
    for name, key in keys.items():
        deployment.write(name, key)
    (folder / "d.pub").mkdir()

    def changes() -> Iterator[None]:
        assert admitted == [keys]
        (folder / "a.pub").write_bytes(b"\xff")
        deployment.remove("b")
        deployment.remove("c")
        (folder / "c.pub").symlink_to(tmp_path / "gone")
        yield
        assert admitted[1:] == [{"a": keys["a"]}]
        assert "a.pub cannot be read" in caplog.text and "d.pub cannot be read" in caplog.text
        deployment.write("b", new_b := new_key())
        deployment.write("e", "no key")
        deployment.fails.add("register")
        yield
        assert admitted[2:] == [{"a": keys["a"]}] and "OSError: cannot start a process" in caplog.text
        assert "e.pub has no public key" in caplog.text
        deployment.fails.clear()
        folder.rename(tmp_path / "away")
        yield
        assert admitted[3:] == [{"a": keys["a"]}]
        (tmp_path / "away").rename(folder)
        deployment.write("a", keys["a"])
        yield
        assert admitted[4:] == [{"a": keys["a"], "b": new_b}] and len(deployment.flower) == 4

    deployment.follow(changes())


def test_a_key_that_was_removed_is_the_same_node_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also under another name, and with another comment in its file; nodes.json is that of an earlier version."""
    deployment = Registration(tmp_path, monkeypatch)
    admitted, first, second = deployment.admitted, new_key(), new_key()
    deployment.flower |= {"1": first, "2": second}
    for name, key in (("client-0", f"{first} host\n"), ("client-1", second)):
        deployment.write(name, key)
    old = {"client-0": {"id": "1", "key": f"{first} host\n"}, "client-1": {"id": "2", "key": second}}
    (tmp_path / registration.KNOWN).write_text(json.dumps(old))

    def changes() -> Iterator[None]:
        assert registration.bound_partitions() == {1: 0, 2: 1}
        deployment.remove("client-1")
        yield
        assert [list(keys) for keys in admitted[1:]] == [["client-0"]]
        assert registration.bound_partitions() == {1: 0} and registration.shut_out() == {2}
        answer = {"success": True, "nodes": [listed(node, "offline") for node in ("1", "2")]}
        nodes = parse_nodes(answer, registration.read_registered(tmp_path))
        assert nodes is not None and [node.name for node in nodes] == ["client-0"], "not the one that is shut out"
        deployment.write("client-1", f"{second} a new comment\n")
        yield
        assert admitted[2].keys() == {"client-0", "client-1"} and not registration.shut_out()
        deployment.remove("client-1")
        deployment.write("client-2", second)
        yield
        assert admitted[3].keys() == {"client-0", "client-2"} and registration.bound_partitions() == {1: 0, 2: 2}
        deployment.write("client-2", third := new_key())
        yield
        assert normal(admitted[4]["client-2"]) == third and registration.bound_partitions() == {1: 0, 12: 2}
        deployment.write("backup", first)
        yield
        assert admitted[5].keys() == {"client-0", "client-2"}, "the name that the node has had stays"
        assert "the key files of backup, client-0 have the same key" in caplog.text
        assert deployment.flower == {"1": first, "2": second, "12": third}

    deployment.follow(changes())


def test_a_removed_key_is_shut_out_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = Registration(tmp_path, monkeypatch)
    for name in "ab":
        deployment.write(name, new_key())

    def full_disk(path: Path, content: str) -> None:
        raise OSError("no space left")

    def changes() -> Iterator[None]:
        deployment.remove("a")
        with monkeypatch.context() as patch:
            patch.setattr(registration, "atomic_write", full_disk)
            yield
        assert [list(keys) for keys in deployment.admitted] == [["a", "b"], ["b"]] and not registration.shut_out()
        yield
        assert registration.shut_out() == {10}

    deployment.follow(changes())
