"""Charts and tables of a report as files: charts as SVG, PNG and CSV, tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from copra_fl.files import atomic_write
from copra_fl.reporting.data_table import DataTable, file_stem
from copra_fl.reporting.html import Figure

#: of images, in pixels
WIDTH, EXTRA_HEIGHT = 760, 44


class NoImages(RuntimeError):
    """Images that cannot be drawn on this machine. The message says what is missing."""


def write_files(folder: Path, figures: Sequence[Figure], tables: Sequence[tuple[str, DataTable]]) -> None:
    """Write every figure and every (name, table) to `folder`, under its own name.

    Raises NoImages, after everything else is written, if there is no kaleido or no Chromium to draw SVG and PNG with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        atomic_write(folder / f"{figure.file_name}.csv", figure.csv)
    for name, table in tables:
        for suffix, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            atomic_write(folder / f"{file_stem(name)}.{suffix}", text)
    _write_images(folder, figures)


def _write_images(folder: Path, figures: Sequence[Figure]) -> None:
    if find_spec("kaleido") is None:
        raise NoImages("kaleido is not installed")
    import plotly.graph_objects as go
    import plotly.io

    charts, files = [], []
    for figure in figures:
        chart = go.Figure(figure.chart)
        title = {"text": figure.title, "x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top"}
        chart.update_layout(
            title=title | {"pad": {"t": 12}},
            margin={"t": 84},
            legend={"y": 0.91},
            width=WIDTH,
            height=chart.layout.height + EXTRA_HEIGHT,
        )
        charts.append(chart)
        files.append(folder / figure.file_name)
    try:
        for suffix in ("svg", "png"):
            plotly.io.write_images(charts, [f"{file}.{suffix}" for file in files], scale=1 if suffix == "svg" else 2)
    except Exception as error:  # kaleido raises errors of many types if the browser is missing or ends
        raise NoImages(f"kaleido cannot draw them ({str(error).strip().splitlines()[0]})") from error
