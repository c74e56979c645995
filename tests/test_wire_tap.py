"""A deployment without TLS with every byte between nodes and SuperLink recorded: the nodes' data is not in it.

test_local_data.py searches the messages; this test searches what Flower sends, on a real connection.
"""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from copra_fl.config import Config, toml_value
from copra_fl.simulation.superlink import copy_app, free_port
from experiments.deployment import SCRIPTS, environment, running, wait_for
from tests.support.node_files import find_leaks, rows_of, write
from tests.support.real_runs import HANG_SECONDS
from tests.support.tiny import Settings


@dataclass
class Tap:
    """A proxy between nodes and SuperLink that records all bytes: `up` to the SuperLink, `down` from it."""

    target: int
    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)
    numbers: tuple[()] = ()

    @property
    def seen(self) -> bytes:
        return bytes(self.up + self.down)

    @contextmanager
    def listening(self) -> Iterator[int]:
        """Listen during the block, on the returned port."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
            yield server.getsockname()[1]

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                node, _ = server.accept()
                superlink = socket.create_connection(("127.0.0.1", self.target))
                for ends in ((node, superlink, self.up), (superlink, node, self.down)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.slow
def test_no_content_of_the_files_is_on_the_wire(own: Settings, tmp_path: Path) -> None:
    files = [write(rows_of(site), tmp_path / f"ward-{site}-admissions.csv") for site in range(2)]
    port, app, output = free_port(), tmp_path / "app", tmp_path / "run"
    tap = Tap(port)
    app.mkdir()
    copy_app(app)
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator" / "config.toml").write_text(
        '[superlink]\ndefault = "deployment"\n\n'
        f'[superlink.deployment]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    settings = own | {"min-nodes": 2, "output": str(output)}
    overrides = " ".join(f"{key}={toml_value(value)}" for key, value in settings.items())  # type: ignore[arg-type]
    with ExitStack() as stack:
        tapped = stack.enter_context(tap.listening())
        stack.enter_context(
            running(tmp_path, "superlink", "flower-superlink", "--insecure", "--host=127.0.0.1", f"--port={port}")
        )
        wait_for(f"http://127.0.0.1:{port}/health")
        for number, file in enumerate(files):
            config = f"partition-id={number} num-partitions=2 data-path='{file}'"
            stack.enter_context(
                running(
                    tmp_path, f"node-{number}", "flower-supernode", "--insecure", f"--superlink=127.0.0.1:{tapped}",
                    f"--port={free_port()}", "--node-config", config,
                )
            )  # fmt: skip
        command = [SCRIPTS / "flwr", "run", str(app), "deployment", "--stream", "--run-config", overrides]
        subprocess.run(
            command, env=environment(tmp_path / "operator"), stdin=subprocess.DEVNULL, check=True, timeout=HANG_SECONDS
        )
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    # The tap works: the labels that the server sends and the scalars that clients send are readable in it.
    assert b"sand,sea,sky" in tap.down and b"distance" in tap.up and len(tap.up) > 10_000
    assert find_leaks(tap, Config.from_flat(own), files) == []
