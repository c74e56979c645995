"""Tables and figures of docs/explanations/findings.md, from committed results: `python -m experiments.findings`.

Between `<!-- NAME -->` and `<!-- end -->` the page holds what is made here, so that each number is that of its file in
experiments/results/. A test makes the tables again and compares. The figures need Chromium (kaleido draws with it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from copra_fl.reporting.figures import study as figures
from copra_fl.reporting.html import DataTable, Figure
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.study import table
from copra_fl.reporting.tables import POINTS
from experiments.papers_summary import PUBLISHED, column

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "explanations" / "findings.md"
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- (?P<name>[\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAPERS_MEASURES = (
    "alone",
    "factor path: accuracy at the midpoint",
    "factor path: midpoint gap",
    "factor path: barrier (Entezari)",
    "product path: accuracy at the midpoint",
    "product path: barrier (Entezari)",
    "merge of 3: average of factors",
    "merge of 3: average of products",
    "kept: every other layer",
    "kept: every other layer, from the second",
    "Shapley: share of the largest third",
    "Shapley: Gini",
)
METRICS = {metric: name.partition(",")[0] for metric, name, _ in figures.PREDICTORS}


def studies() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Grid -> its newest results and their file."""
    paths = {path.name.split("-")[1]: path for path in sorted(RESULTS.glob("study-*.json"))}
    return {name: (path, json.loads(path.read_text(encoding="utf-8"))) for name, path in paths.items()}


def blocks() -> Iterator[tuple[str, str]]:
    """Name and content of every block that the page may hold."""
    for name, (path, results) in studies().items():
        yield f"{name} results", f"{markdown(table(results))}\n{source(path, results)}\n"
        yield f"{name} copra", markdown(copra_against(results))
        yield f"{name} predictors", markdown(predictors(results))
    path = sorted(RESULTS.glob("papers-*.json"))[-1]
    facts = json.loads(path.read_text(encoding="utf-8"))
    yield "papers", f"{markdown(papers(facts))}\n{source(path, facts)} `{path.stem}.md` has all measures.\n"


def source(path: Path, results: Mapping[str, Any]) -> str:
    """Return the sentence below a table: its file, and the command that wrote the file."""
    return f"From `experiments/results/{path.name}`.\nCommand: `{results['command']}`."


def copra_against(results: Mapping[str, Any]) -> DataTable:
    """CopRA minus each other method, paired by seed: a row a cell."""
    others = [method for method in results["cells"][0]["methods"] if method != "copra"]
    rows = []
    for cell in results["cells"]:
        ours = cell["methods"]["copra"]["test_accuracy"]["values"]
        theirs = [cell["methods"][other]["test_accuracy"]["values"] for other in others]
        gains = [estimate([a - b for a, b in zip(ours, values, strict=True)]) for values in theirs]
        rows.append([figures.label(cell), *map(POINTS.show, gains)])
    return DataTable(["copra minus, points", *others], rows)


def predictors(results: Mapping[str, Any]) -> DataTable:
    """How what is measured of averaging goes with a gain over the baseline, over all methods with adapters."""
    rows = []
    for metric, name in METRICS.items():
        found = figures.gains_against(results, metric)
        correlation = figures.pearson(found) if found else None
        shown = "no spread" if correlation is None else f"{correlation:+.2f}".replace("-", "−")
        rows.append([name, shown, str(sum(map(len, found.values())))])
    return DataTable(
        ["minus the baseline's", "Pearson correlation with the gain in test accuracy", "pairs of runs"], rows
    )


def papers(facts: Mapping[str, Any]) -> DataTable:
    """What the papers claim, LoRA against CopRA outside a federation."""
    rows = []
    for measure in PAPERS_MEASURES:
        lora, copra, difference = facts["measures"][measure].values()
        shown = column(measure)
        cells = [shown.show(lora), shown.show(copra), column(measure, "+").show(difference)]
        rows.append([measure, *cells, PUBLISHED.get(measure, "")])
    return DataTable(["%, points; barriers in nats", "lora", "copra", "copra − lora", "published elsewhere"], rows)


def images() -> Iterator[tuple[str, Figure]]:
    """File name and figure of every picture."""
    for name, (_, results) in studies().items():
        for what, found in (("gains", figures.gains(results)), ("accuracies", figures.accuracies(results))):
            yield f"findings-{name}-{what}.svg", found[0]


def markdown(of: DataTable) -> str:
    """A table as Markdown, its caption below."""
    lines = [of.header, ["---"] * len(of.header), *of.rows]
    caption = f"\n{of.caption}\n" if of.caption else ""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + caption


def filled(page: str) -> str:
    """`page` with the present content of its blocks. Raises KeyError for a block whose results are not there."""
    content = dict(blocks())
    return BLOCK.sub(lambda block: f"{block[1]}{content[block['name']]}{block[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for file, figure in images():
        figure.chart.write_image(IMAGES / file, width=900, height=380)
