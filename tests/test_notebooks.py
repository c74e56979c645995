"""The notebooks of the documentation: saved with the outputs of a whole run, which they still give."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebooks import NOTEBOOKS, execute
from tests.support.real_runs import HANG_SECONDS, marked_processes, wait_until
from tests.support.tiny import Settings


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[list[str]]:
    """Return the kinds of the outputs of a cell: names of streams, or types of data."""
    return [sorted(output.get("data", [output.get("name", "error")])) for output in cell["outputs"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_saved_with_the_outputs_of_a_whole_run(path: Path) -> None:
    cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [kind for cell in cells for kind in kinds(cell)]
    assert ["error"] not in shown and ["application/vnd.plotly.v1+json"] in shown and ["text/html"] in shown


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_was_saved_with(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    saved, executed = json.loads(path.read_text(encoding="utf-8")), execute(path, tmp_path)
    for before, now in zip(code_cells(saved), code_cells(executed), strict=True):
        assert (before["source"], kinds(before)) == (now["source"], kinds(now))


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[Any, Any, str]]:
    """A Jupyter kernel in `tmp_path`: its manager, its client, and the mark of its processes."""
    manager = pytest.importorskip("jupyter_client").KernelManager()
    mark = uuid.uuid4().hex
    manager.start_kernel(cwd=str(tmp_path), env=os.environ | {"COPRA_FL_TEST": mark})
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=HANG_SECONDS)
        yield manager, client, mark
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def answer(client: Any, message: str) -> dict[str, Any]:
    """Return the content of the kernel's reply to the request `message`."""
    while (reply := client.get_shell_msg(timeout=HANG_SECONDS))["parent_header"].get("msg_id") != message:
        pass
    return reply["content"]


@pytest.mark.slow
def test_an_interrupted_and_a_restarted_kernel_leave_no_process_of_a_run(
    tiny: Settings, tmp_path: Path, kernel: tuple[Any, Any, str]
) -> None:
    """An interrupt is a KeyboardInterrupt in the cell, after which the kernel goes on; a restart kills the kernel."""
    manager, client, mark = kernel
    recipe = tiny | {"num-rounds": 50, "local-steps": 100}

    def start(output: str) -> str:
        message: str = client.execute(f"import copra_fl\ncopra_fl.simulate({recipe!r}, output={output!r}, workers=1)")
        wait_until((tmp_path / output / "journal.jsonl").exists, f"round 1 of {output}")
        assert marked_processes(mark, "ray::"), "workers of Ray"
        return message

    def others() -> list[str]:
        return [" ".join(process.cmdline()) for process in marked_processes(mark) if process.pid != kernel_pid()]

    def kernel_pid() -> int:
        return int(manager.provisioner.process.pid)

    message = start("interrupted")
    manager.interrupt_kernel()
    reply = answer(client, message)
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    assert others() == [], "when the cell has ended"
    assert answer(client, client.execute("1 + 1"))["status"] == "ok"

    start("restarted")
    manager.restart_kernel(now=True)
    wait_until(lambda: not others(), "no process left")
