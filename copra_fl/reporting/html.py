"""Self-contained HTML pages of figures and tables.

`render` fills ``html.html.j2`` and puts plotly.js inline, compressed. The page needs no network and no second file, and
its content security policy makes the browser refuse to use one.
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from copra_fl.reporting.data_table import DataTable, file_stem
from copra_fl.reporting.results import ResultsError

HEIGHT = 340


@dataclass(frozen=True)
class Style:
    color: str
    symbol: str
    dash: str


#: Okabe and Ito's colors, distinct with any color vision; symbol and dash distinguish the styles in print
STYLES = (
    Style("#0072B2", "circle", "solid"),
    Style("#D55E00", "square", "dash"),
    Style("#009E73", "diamond", "dot"),
    Style("#CC79A7", "triangle-up", "dashdot"),
    Style("#E69F00", "cross", "longdash"),
    Style("#56B4E9", "x", "longdashdot"),
    Style("#000000", "star", "solid"),
)


@dataclass(frozen=True)
class Figure:
    """A chart with a title, and a caption that says how to read it and on which data it was measured.

    Attributes:
        wide: it takes the whole width of the page.
    """

    title: str
    caption: str
    chart: go.Figure
    wide: bool = False

    @property
    def file_name(self) -> str:
        """Return a name for files with the chart, without suffix: ``accuracy-by-round``."""
        return file_stem(self.title)

    @property
    def csv(self) -> str:
        """Return the chart's points as CSV: series, x, y, and as far as it has them cells and ends of intervals."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("series", "x", "y", "value", "error_above", "error_below"))
        for trace in self.chart.data:
            name, x, y = trace.name or "", _values(trace.x), _values(trace.y)
            if "z" in trace:
                for row_y, row in zip(y, _values(trace.z), strict=True):
                    writer.writerows((name, row_x, row_y, value) for row_x, value in zip(x, row, strict=True))
            elif trace.type != "scatter" or trace.mode != "none":  # a band repeats the lines inside it
                bars = [trace[key] for key in ("error_x", "error_y") if key in trace and trace[key].array is not None]
                above = _values(bars[0].array) if bars else [""] * len(x)
                below = _values(bars[0].arrayminus) if bars and bars[0].arrayminus is not None else above
                writer.writerows(zip([name] * len(x), x, y, [""] * len(x), above, below, strict=True))
        return lines.getvalue()

    @property
    def json(self) -> str:
        """Return data and layout for ``Plotly.newPlot``, safe inside a ``script`` element."""
        return self.chart.to_json().replace("<", "\\u003c")


def _values(array: Any) -> Sequence[Any]:
    """Return an array of a trace; one that was read from JSON is an object with its bytes (plotly's typed array)."""
    if not isinstance(array, Mapping):
        return array
    values: Any = np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])
    reshaped: Sequence[Any] = values.reshape([int(size) for size in str(array.get("shape", len(values))).split(",")])
    return reshaped


@dataclass(frozen=True)
class Section:
    """A heading with figures and tables under it; a `collapsed` one opens with a click."""

    title: str
    figures: Sequence[Figure] = ()
    tables: Sequence[DataTable] = ()
    collapsed: bool = False


def pack(sections: Sequence[Section]) -> list[dict[str, object]]:
    """Return the figures of `sections` as plain data for `unpack`, so that another page can show them."""
    figures = [figure for section in sections for figure in section.figures]
    return [vars(figure) | {"chart": json.loads(figure.chart.to_json())} for figure in figures]


def unpack(packed: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the figures from the output of `pack`."""
    return [Figure(**{**figure, "chart": go.Figure(figure["chart"])}) for figure in packed]


def read_section(path: Path) -> Section:
    """Return the section of ``title`` and packed ``figures`` in the JSON file `path`.

    Raises ResultsError for a file that is damaged or of another version.
    """
    try:
        stored = json.loads(path.read_bytes())
        return Section(stored["title"], unpack(stored["figures"]))
    except (ValueError, KeyError, TypeError):
        raise ResultsError(
            f"{path} is damaged or of another version of copra-fl; remove it, or repeat the probe"
        ) from None


def empty_chart(x_axis: Mapping[str, object], y_axis: Mapping[str, object]) -> go.Figure:
    """Return a chart without data in the page's style; the axes are arguments of plotly's layout."""
    chart = go.Figure()
    chart.update_layout(
        template="plotly_white",
        height=HEIGHT,
        margin={"l": 8, "r": 8, "t": 40, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 14, "color": "#1f2933"},
        legend={"orientation": "h", "xref": "container", "yref": "container", "x": 0, "y": 1, "yanchor": "top"},
        showlegend=True,
        hoverlabel={"namelength": -1},
    )
    defaults: dict[str, object] = {"automargin": True, "ticklabelstandoff": 4}
    chart.update_xaxes(**(defaults | dict(x_axis)))
    chart.update_yaxes(**(defaults | dict(y_axis)))
    for axis in (chart.layout.xaxis, chart.layout.yaxis):
        axis.title.update(font={"size": 14}, standoff=8)
    return chart


def titled(figure: Figure) -> go.Figure:
    """Return the chart of `figure` with its title above it, for use outside of a page."""
    chart = go.Figure(figure.chart)
    room = 36
    height = (chart.layout.height or HEIGHT) + room
    title = {"text": figure.title, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 8, "l": 8}}
    chart.update_layout(title=title, height=height, margin={"t": (chart.layout.margin.t or 40) + room})
    chart.update_layout(legend={"y": 1 - room / height})
    return chart


def colorbar(title: str) -> dict[str, object]:
    """Return the color bar of a heat map in the page's style."""
    return {"title": {"text": title, "side": "right", "font": {"size": 14}}, "thickness": 12}


@functools.cache
def packed_plotly() -> str:
    """Return plotly.js, compressed by zlib, in base64: 2 MB in place of 4.8 MB. The page unpacks it."""
    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 9)).decode()


def render(
    title: str,
    setting: str,
    verdict: str,
    warnings: Sequence[str],
    results: Sequence[DataTable],
    sections: Sequence[Section],
) -> str:
    """Return the page as HTML: verdict, warnings and `results` first, then `sections`."""
    template = Path(__file__).with_name("html.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(
        title=title,
        setting=setting,
        verdict=verdict,
        warnings=warnings,
        results=results,
        sections=sections,
        plotly=packed_plotly(),
    )
