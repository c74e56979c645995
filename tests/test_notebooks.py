"""The notebooks of the documentation: saved with the outputs of a whole run, which they still give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebooks import NOTEBOOKS, execute


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
