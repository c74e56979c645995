"""Make a page of each notebook in docs/notebooks, from the outputs that it was saved with. MkDocs runs this file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from plotly.offline import get_plotlyjs

NOTEBOOKS = Path(__file__).parent / "notebooks"
PLOTLY = "plotly.min.js"
CHART = "application/vnd.plotly.v1+json"
#: the codes by which a command colors what it prints
COLOR = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for each notebook, and the script that draws their charts."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page(path)))
    files.append(File.generated(config, f"notebooks/{PLOTLY}", content=get_plotlyjs()))
    return files


def page(path: Path) -> str:
    """Return a notebook as Markdown, with a link to its file below the title."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title, _, introduction = "".join(cells[0]["source"]).partition("\n")
    parts = [title, f'<script src="{PLOTLY}"></script>', f"[This page as a notebook]({path.name})", introduction]
    for number, cell in enumerate(cells[1:]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [shown(output, f"chart-{number}-{place}") for place, output in enumerate(cell["outputs"])]
    return "\n\n".join(parts)


def shown(output: dict[str, Any], name: str) -> str:
    """Return an output of a cell: a chart, HTML, or text. `name` is the id of the chart's element."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if CHART in data:
        figure = json.dumps({"data": data[CHART]["data"], "layout": data[CHART]["layout"]}).replace("<", "\\u003c")
        return f'<div id="{name}"></div>\n<script>Plotly.newPlot("{name}", {figure})</script>'
    if "text/html" in data:
        lines = "".join(data["text/html"]).splitlines()
        return "<div>" + "\n".join(line.strip() for line in lines if line.strip()) + "</div>"
    text = COLOR.sub("", "".join(data["text/plain"])).rstrip()
    return f"```text\n{text}\n```"
