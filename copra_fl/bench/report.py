"""The page of one or several benchmarks, made from their stored facts.

Ratios are within a run. Runs are not mixed: a size that two runs measured has two sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from copra_fl.bench import figures, findings, gpu, population, population_figures
from copra_fl.bench.findings import BenchFacts
from copra_fl.bench.summary import left_out
from copra_fl.bench.verdict import paragraphs
from copra_fl.reporting import html
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.html import Section

CHARTS = (
    figures.speed,
    figures.ratios,
    figures.matmul_share,
    figures.memory,
    figures.scaling,
    figures.schedule,
)


def render(runs: Sequence[BenchFacts]) -> str:
    """Return the page as HTML. `runs` are the contents of the NAME.json files of `copra-fl bench`."""
    verdicts = [findings.targets(facts) for facts in runs]
    judged = [row for table in verdicts for row in table.rows]
    met = sum(row[-1] == "met" for row in judged)
    targets_met = f"{met} of {len(judged)} targets met." if judged else "No target was measured."
    return html.render(
        title="Benchmark",
        setting=" · ".join(f"{findings.machine(facts)}, {facts['date']}" for facts in runs),
        verdict="\n\n".join([targets_met, *(text for facts in runs for text in paragraphs(facts))]),
        warnings=list(_warnings(runs)),
        results=[table for table in verdicts if table.rows],
        sections=[*_other_sections(runs), *(s for facts in runs for s in _sections(facts, dated=len(runs) > 1))],
    )


def _warnings(runs: Sequence[BenchFacts]) -> Iterator[str]:
    """Yield the parts that each run left out."""
    for facts in runs:
        if sentences := " ".join(left_out(facts)):
            yield f"{facts['date']}: {sentences}"


def _other_sections(runs: Sequence[BenchFacts]) -> Iterator[Section]:
    """Yield the sections of the sizes without competitors, ``clients`` and ``gpu``."""
    for facts in runs:
        if charts := population_figures.figures(facts):
            yield Section(f"From 100 to 100,000 clients, {facts['date']}", charts, population.tables(facts))
        if tables := gpu.tables(facts):
            yield Section(f"{tables[0].title}, {facts['date']}", tables=tables)


def _sections(facts: BenchFacts, dated: bool) -> Iterator[Section]:
    for name in facts["sizes"]:
        tables = findings.size_tables(facts, name)
        charts = [figure for chart in CHARTS for figure in chart(facts, name)]
        title = f"{tables[0].title}, {facts['date']}" if dated else tables[0].title
        yield Section(title, charts, tables)
    origin = {
        "command": facts["command"],
        "date": facts["date"],
        "repeats": facts["repeats"],
        **facts["machine"],
        **facts["versions"],
    }
    provenance = DataTable(["", "value"], [[key, str(value)] for key, value in origin.items()])
    title = f"Competitors and machine, {facts['date']}"
    yield Section(title, tables=[findings.competitors(facts), provenance], collapsed=True)
