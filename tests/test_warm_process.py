"""The warm process of a node: it answers as the node's own process would, and ends when it should; its cache."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from torch import nn

from clients import warm_cache, warm_process
from clients.node_config import NodeConfig
from clients.warm_process import WarmProcessError
from copra_fl import secure_wire, wire
from copra_fl.config import Config, ModelConfig
from copra_fl.secure_aggregation.keys import new_identity
from copra_fl.secure_aggregation.node import offer_keys
from copra_fl.training.engine import Engine, open_engine
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.real_runs import HANG_SECONDS
from tests.support.tiny import Settings

NODE_CONFIG = {"warm-process": 60}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The socket of the warm process of this process's parent."""
    warm_process.address().unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(warm_process.address()))
        listener.listen()
        yield listener
    warm_process.address().unlink(missing_ok=True)


@pytest.fixture
def serving(listener: socket.socket) -> Iterator[threading.Thread]:
    """A thread that serves run 1; in this process, which has imported everything already."""
    thread = threading.Thread(target=warm_process.serve, args=(listener, psutil.Process(), 1, 60), daemon=True)
    thread.start()
    yield thread
    if thread.is_alive():
        send(run=2)
    thread.join()


def send(run: int) -> None:
    """Send a message of `run` and do not wait for the answer."""
    with Client(str(warm_process.address()), "AF_UNIX") as connection:
        connection.send(("handshake", RecordDict(), Context(run, 1, {}, RecordDict(), {})))


def test_a_warm_process_trains_bitwise_as_a_cold_one(tiny: Settings, tmp_path: Path, serving: threading.Thread) -> None:
    """With flora nodes cache state between rounds, which goes to the warm process and back."""
    settings = tiny | {"rule": "flora"}
    cold = run_federation(settings, tmp_path / "cold")
    warm_grid = LocalGrid(2, node_configs=[NODE_CONFIG, NODE_CONFIG])
    warm = run_federation(settings, tmp_path / "warm", grid=warm_grid)
    adapters = [(directory / "adapter/adapter_model.safetensors").read_bytes() for directory in (cold, warm)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("data_path", [{}, {"data-path": "/ward-7/admissions.csv"}])
def test_an_error_comes_back_as_its_public_message(
    serving: threading.Thread, tiny: Settings, data_path: dict[str, str]
) -> None:
    """Complete, or from a node with its own data only type and place."""
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 1} | data_path, RecordDict(), {})
    content = wire.pack_config(Config.from_flat(tiny | {"partitioner": "own" if data_path else "iid"}))
    with pytest.raises(WarmProcessError) as error:
        warm_process.request("train", content, context, 60)
    assert ("KeyError at " if data_path else "'plan'") in str(error.value)
    assert "ward-7" not in str(error.value) and "\n" not in str(error.value)


def test_a_failed_step_of_secure_aggregation_leaves_no_secrets(serving: threading.Thread) -> None:
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 2}, RecordDict(), {})
    secrets, _ = offer_keys("run", 1, 0, new_identity())
    secure_wire.write_secrets(context.state, secrets)
    with pytest.raises(WarmProcessError, match="node 0 takes part in no round"):
        warm_process.request("unmask", RecordDict(), context, 60)
    assert secure_wire.read_secrets(context.state) is None


def test_a_process_frees_its_model_before_it_opens_another(tiny: Settings) -> None:
    """Two bases do not fit on a GPU that one of them fills. Blocks that are computed again refer to themselves."""
    blocks: list[weakref.ref[nn.Module]] = []

    def open_counted(config: ModelConfig) -> Engine:
        assert [block() for block in blocks] == [None] * len(blocks), "the other models are gone"
        opened = open_engine("peft", config, "layer", 3, seed=0)
        blocks.append(weakref.ref(opened.model.base.get_submodule("encoder.layer.0.attention")))
        return opened

    kept = warm_cache.KeepNewest(open_counted)
    config = Config.from_flat(tiny | {"gradient-checkpointing": True}).model
    assert kept(config) is kept(replace(config))
    kept(replace(config, rank=3))
    kept(config)
    assert len(blocks) == 3


def test_the_methods_of_a_comparison_share_their_data(tiny: Settings) -> None:
    node, config = NodeConfig(0, 1), Config.from_flat(tiny)
    data = node.open_data(config)
    assert node.open_data(config.changed(rule="flora", local_training="lora", learning_rate=0.5, num_rounds=7)) is data
    for changed in (config.changed(seed=1), config.changed(num_clients=5)):
        assert node.open_data(changed).digest != data.digest


def test_a_warm_process_ends_with_a_message_of_another_run(serving: threading.Thread) -> None:
    send(run=2)
    serving.join(timeout=HANG_SECONDS)
    assert not serving.is_alive()
    with pytest.raises(ConnectionRefusedError):
        send(run=2)


def open_to_others(temporary: Path) -> None:
    (temporary / f"copra-fl-{os.getuid()}").mkdir()
    (temporary / f"copra-fl-{os.getuid()}").chmod(0o755)


def a_file(temporary: Path) -> None:
    (temporary / f"copra-fl-{os.getuid()}").touch()


def made_by_another_user(temporary: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a folder away")
    (temporary / f"copra-fl-{os.getuid()}").mkdir(mode=0o700)
    os.chown(temporary / f"copra-fl-{os.getuid()}", 12345, 12345)


@pytest.mark.parametrize(
    ("prepare", "depth", "reason"),
    [
        (open_to_others, 0, "is open to others; it must belong to this user and have mode 700"),
        (made_by_another_user, 0, "is open to others; it must belong to this user and have mode 700"),
        (a_file, 0, "File exists"),
        (None, 100, "AF_UNIX path too long"),
    ],
)
def test_a_node_that_can_have_no_warm_process_answers_without_one(
    prepare: Callable[[Path], None] | None, depth: int, reason: str, tiny: Settings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    temporary = tmp_path / ("x" * depth)
    temporary.mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if prepare:
        prepare(temporary)
    config = Config.from_flat(tiny)
    answers = []
    for node_config in (NODE_CONFIG, {}):
        grid = LocalGrid(1, node_configs=[node_config])
        message = Message(wire.pack_config(config), 100, MessageType.QUERY)
        with caplog.at_level("WARNING", logger="flwr"):
            answers.append(wire.unpack_handshake(grid.answer(message).content))
    assert answers[0] == answers[1] and answers[0].num_examples
    (line,) = [record.getMessage() for record in caplog.records if record.name == "flwr"]
    assert line.startswith("handshake is handled without a warm process: ") and reason in line


def test_a_warm_process_ends_with_the_executor(listener: socket.socket) -> None:
    """The executor is the process that starts the node's apps."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as executor:
        serving = threading.Thread(
            target=warm_process.serve, args=(listener, psutil.Process(executor.pid), 1, 3600), daemon=True
        )
        serving.start()
        serving.join(timeout=0.2)
        assert serving.is_alive()
        executor.communicate(b"\n")
    serving.join(timeout=HANG_SECONDS)
    assert not serving.is_alive()


@pytest.mark.parametrize(
    ("idle_seconds", "exit_code"), [pytest.param(0, 0, id="idle"), pytest.param(3600, 1, id="caller-has-ended")]
)
def test_a_warm_process_ends_when_it_is_not_needed(listener: socket.socket, idle_seconds: int, exit_code: int) -> None:
    """It has been idle for too long, or the caller does not wait for the answer to its message."""
    process = warm_process.start(listener, os.getpid(), 1, idle_seconds)
    if idle_seconds:
        send(run=1)
    assert process.wait(timeout=HANG_SECONDS) == exit_code
