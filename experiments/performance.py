"""Write tables and chart of docs/explanations/performance.md: `python -m experiments.performance`.

They come from committed results. As for the findings (`experiments.findings`), the page has them between
`<!-- NAME -->` and `<!-- end -->`, and a test makes the tables again and compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from copra_fl.bench import findings, population, population_figures
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.html import Figure
from experiments.findings import BLOCK, RESULTS, ROOT, source, write

PAGE = ROOT / "docs" / "explanations" / "performance.md"
CHART = "performance-clients.svg"
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "{docs}/explanations/performance.md"
#: results with the rivals in both number formats: ``bench-DATE-NAME.json``
COMPARED = ("overhead", "small", "compute")


def newest(size: str) -> tuple[Path, dict[str, Any]]:
    """Return the newest ``bench-DATE-SIZE.json``, and its results."""
    path = sorted(RESULTS.glob(f"bench-*-{size}.json"))[-1]
    return path, json.loads(path.read_text(encoding="utf-8"))


def blocks() -> Iterator[tuple[str, str]]:
    """Yield name and content of every block of the page."""
    path, facts = newest("clients")
    times, memory = (replace(table, title="").markdown() for table in population.tables(facts))
    yield "clients", f"{times}\n{source(path, facts['command'])}\n"
    yield "clients memory", memory
    yield "workers", workers().markdown()
    commands = "".join(f"{source(path, facts['command'])}\n" for path, facts in map(newest, COMPARED))
    yield "gains", f"{gains().markdown()}\n{commands}"


def gains() -> DataTable:
    """Return clients per second and the two parts of each gain, of every size of the compared results."""
    rows = []
    for path, facts in map(newest, COMPARED):
        for name, size in facts["sizes"].items():
            for gain in findings.split_gains(size["competitors"]):
                ours = size["competitors"][gain.letter]
                speed = median(ours["trainings"][gain.training]["clients_per_second"])
                factors = [f"{factor:.2f}" for factor in (gain.total, gain.number_format, gain.engine)]
                rival = size["competitors"][gain.rival]["name"]
                what = f"{ours['name']} / {rival}"
                rows.append(
                    [name, str(size["size"]["clients"]), what, gain.training, f"{speed:.3g}", *factors, path.stem]
                )
    header = ["size", "clients", "ratio", "training", "clients/s", "total", "number format", "engine", "file"]
    caption = (
        "Ratios of clients per second. Number format: the rival in bfloat16 with eager attention, as ours, over itself "
        "in float32 with sdpa. Engine: ours over the rival in our format. Their product is the total."
    )
    return DataTable(header, rows, caption)


def workers() -> DataTable:
    """Return time and memory of each size in both splits of the cores, of our engine over Flower or else in process."""
    rows = []
    for size in ("overhead", "small", "compute"):
        path, facts = newest(size)
        competitors = facts["sizes"][size]["competitors"]
        ours = competitors.get("e") or competitors["g"]
        for split, seconds in ours["trial_seconds"].items():
            cells = [f"{seconds:.1f}", f"{ours['peak_memory'][split] / 1e6:,.0f}"]
            rows.append([size, f"{ours['name']}, {ours['dtype']}", split, *cells, f"`{path.name}`"])
    header = ["size", "of", "workers x threads", "seconds", "peak MB", "file"]
    caption = "Seconds of all steady rounds in the first run of each split, and the memory of all processes together."
    return DataTable(header, rows, caption)


def chart() -> Figure:
    """Return the chart of seconds by number of clients."""
    (figure,) = population_figures.figures(newest("clients")[1])
    return figure


def images(page: str) -> Iterator[tuple[str, Figure]]:
    """Yield file name and figure of the chart if `page` shows it."""
    if CHART in page:
        yield CHART, chart()


def filled(page: str) -> str:
    """Return `page` with the current content of its blocks. Raises KeyError for a block without results."""
    content = dict(blocks())
    return BLOCK.sub(lambda block: f"{block[1]}{content[block['name']]}{block[3]}", page)


if __name__ == "__main__":
    write(PAGE, filled, images, height=460)
