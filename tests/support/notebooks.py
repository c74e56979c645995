"""The notebooks of the documentation: ``python -m tests.support.notebooks`` runs them and saves their outputs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.documents import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
#: the longest that a cell may take
CELL_SECONDS = 1800


def execute(path: Path, folder: Path) -> dict[str, Any]:
    """Return the notebook at `path` with its outputs, after it has run in docs/notebooks below the empty `folder`."""
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(ROOT / "docs" / "tutorials", folder / "docs" / "tutorials")
    working = folder / "docs" / "notebooks"
    working.mkdir()
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # the data of a chart, without plotly's script
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(working)}}
    ).execute()
    # without paths of this machine, times, and what a frame is in plain text
    outputs = json.loads(json.dumps(notebook).replace(f"{working}/", ""))
    for cell in outputs["cells"]:
        cell["metadata"] = {}
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                del output["data"]["text/plain"]
    return outputs


if __name__ == "__main__":
    for notebook_path in map(Path, sys.argv[1:]) if len(sys.argv) > 1 else NOTEBOOKS:
        with tempfile.TemporaryDirectory() as temporary:
            executed = execute(notebook_path, Path(temporary))
        notebook_path.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
