"""What stays on a node between messages: it answers as the process itself would, and ends when it should."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, RecordDict

from clients import warm_process
from clients.warm_process import ResidentError
from copra_fl import wire
from copra_fl.config import Config
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.real_runs import HANG_SECONDS

WARM = {"keep-warm": 60}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Of a resident of this process's parent."""
    warm_process.address().unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(warm_process.address()))
        listener.listen()
        yield listener
    warm_process.address().unlink(missing_ok=True)


@pytest.fixture
def serving(listener: socket.socket) -> Iterator[threading.Thread]:
    """One of run 1, in this process, which has all imported already."""
    thread = threading.Thread(target=warm_process.serve, args=(listener, psutil.Process(), 1, 60), daemon=True)
    thread.start()
    yield thread
    if thread.is_alive():
        say(run=2)
    thread.join()


def say(run: int) -> None:
    """A message of `run`, whose answer nobody waits for."""
    with Client(str(warm_process.address()), "AF_UNIX") as connection:
        connection.send(("hello", RecordDict(), Context(run, 1, {}, RecordDict(), {})))


def test_a_resident_s_adapter_is_the_process_s_own(
    tiny: dict[str, object], tmp_path: Path, serving: threading.Thread
) -> None:
    """Bitwise; with flora nodes hold state from round to round, which goes to the resident and back."""
    settings = tiny | {"rule": "flora"}
    own = run_federation(settings, tmp_path / "own")
    theirs = run_federation(settings, tmp_path / "theirs", grid=LocalGrid(2, own=[WARM, WARM]))
    adapters = [(directory / "adapter/adapter_model.safetensors").read_bytes() for directory in (own, theirs)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("own", [{}, {"data-path": "/ward-7/admissions.csv"}])
def test_an_error_comes_back_in_words_that_may_leave(
    serving: threading.Thread, tiny: dict[str, object], own: dict[str, str]
) -> None:
    """As it is, or, of a node with data of its own, only kind and place."""
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 1} | own, RecordDict(), {})
    content = wire.pack_config(Config.from_flat(tiny | {"partitioner": "own" if own else "iid"}))
    with pytest.raises(ResidentError) as error:
        warm_process.ask("train", content, context, 60)
    assert "'plan'" in str(error.value) if not own else "KeyError at " in str(error.value)
    assert "ward-7" not in str(error.value) and "\n" not in str(error.value)


def test_a_resident_makes_way_for_another_run_s(serving: threading.Thread) -> None:
    say(run=2)
    serving.join(timeout=HANG_SECONDS)
    assert not serving.is_alive()
    with pytest.raises(ConnectionRefusedError):
        say(run=2)


def test_a_folder_that_others_can_open_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert warm_process.address().parent.stat().st_mode & 0o777 == 0o700
    warm_process.address().parent.chmod(0o755)
    with pytest.raises(ResidentError, match="open to others"):
        warm_process.address()


def test_a_resident_ends_with_the_process_that_starts_its_node_s_apps(listener: socket.socket) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as executor:
        serving = threading.Thread(
            target=warm_process.serve, args=(listener, psutil.Process(executor.pid), 1, 60), daemon=True
        )
        serving.start()
        serving.join(timeout=0.2)
        assert serving.is_alive()
        executor.communicate(b"\n")
    serving.join(timeout=HANG_SECONDS)
    assert not serving.is_alive()


@pytest.mark.parametrize(("seconds", "code"), [(0, 0), (60, 1)])
def test_a_resident_ends_when_nobody_wants_it(listener: socket.socket, seconds: int, code: int) -> None:
    """Idle for `seconds`; or at work, and who asked does not wait for the answer."""
    process = warm_process.start(listener, os.getpid(), 1, seconds)
    if seconds:
        say(run=1)
    assert process.wait(timeout=HANG_SECONDS) == code
