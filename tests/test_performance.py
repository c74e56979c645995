"""The tables of docs/explanations/performance.md equal those of the committed results."""

from __future__ import annotations

from experiments import performance
from experiments.findings import IMAGES


def test_tables_equal_those_of_the_committed_results() -> None:
    page = performance.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") == len(dict(performance.blocks()))
    assert performance.filled(page) == page, "run `python -m experiments.performance`"
    assert f"images/{performance.CHART}" in page and (IMAGES / performance.CHART).exists()
    counts = {len(trace.x) for trace in performance.chart().chart.data}
    assert counts == {len(performance.newest("clients")[1]["clients"])}
