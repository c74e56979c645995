"""Write tables and figures of docs/explanations/findings.md from committed results: `python -m experiments.findings`.

The page has them between `<!-- NAME -->` and `<!-- end -->`, so each number equals that of its file in
experiments/results/. A test makes the tables again and compares. The figures need Chromium (kaleido draws with it).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from copra_fl.records import CellResults, Estimate, StudyResults
from copra_fl.reporting.data_table import DataTable, with_minus
from copra_fl.reporting.figures import study as figures
from copra_fl.reporting.grid import rank_methods, ranking_table, rate_regret, regret_table
from copra_fl.reporting.html import Figure
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.study import averaging_table
from copra_fl.reporting.study import table as study_table
from copra_fl.reporting.tables import POINTS, TEST_ACCURACY
from copra_fl.wording import join_words
from experiments import two_federations_summary
from experiments.papers_summary import PUBLISHED, column

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "explanations" / "findings.md"
IMAGES = ROOT / "docs" / "images"
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "{docs}/explanations/findings.md"
#: in the committed studies, on two nodes with eight clients a round; a node gets one copy of an adapter for its clients
CLIENTS_PER_NODE = 4
#: metrics of the traffic
BYTES = ("bytes_up", "bytes_down")
BLOCK = re.compile(r"(<!-- (?P<name>[\w. -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
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


def studies(folder: Path = RESULTS) -> dict[str, tuple[Path, StudyResults]]:
    """Return grid -> newest ``study-GRID-DATE.json`` in `folder`, and its results."""
    paths = {path.stem.removeprefix("study-").rpartition("-")[0]: path for path in sorted(folder.glob("study-*.json"))}
    return {name: (path, StudyResults.from_json(path.read_text(encoding="utf-8"))) for name, path in paths.items()}


def blocks() -> Iterator[tuple[str, str]]:
    """Yield name and content of every block that the page may have."""
    for name, (path, results) in studies().items():
        yield f"{name} results", f"{study_table(results).markdown()}\n{source(path, results.command)}\n"
        yield f"{name} averaging", averaging_table(results).markdown()
        if "copra" in results.cells[0].methods:
            yield f"{name} copra", copra_against(results).markdown()
        yield f"{name} predictors", predictors(results).markdown()
        yield f"{name} rates", plain(regret_table(rate_regret(results.cells), len(results.cells)))
        yield f"{name} ranking", "".join(map(plain, ranking_table(results.cells, rank_methods(results.cells))))
        yield f"{name} traffic", f"{traffic(results).markdown()}\n{source(path, results.command)}\n"
    yield "advice", advice(studies()).markdown()
    for path in sorted(RESULTS.glob("elastic-*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        yield f"elastic {facts['split']}", f"{elastic(facts).markdown()}\n{source(path, facts['command'])}\n"
    if merged := [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("two-federations-*"))]:
        commands = "".join(f"Command: `{facts['command']}`.\n" for facts in merged)
        yield "two federations", f"{two_federations_summary.table(merged).markdown()}\n{commands}"
    path = sorted(RESULTS.glob("papers-*.json"))[-1]
    facts = json.loads(path.read_text(encoding="utf-8"))
    yield "papers", f"{papers(facts).markdown()}\n{source(path, facts['command'])} `{path.stem}.md` has all measures.\n"


def advice(results: Mapping[str, tuple[Path, StudyResults]]) -> DataTable:
    """Return what to use under which constraint, with what it buys according to the `results`."""
    moments, equal_bytes, headline = (results[name][1] for name in ("passes-optimizer", "passes-moments", "headline"))
    cell, rates = moments.cells[0], rate_regret(headline.cells)
    times = share_of_bytes(cell, "lora+shared", "lora")
    more = share_of_bytes(equal_bytes.cells[0], "lora", "lora+shared") - 1
    depths, uplink = results["passes-depths"][1], results["passes-bytes"][1]
    rules, drift = results["ranking-rules"][1], results["ranking-fresh-seeds"][1]
    shares = join_words(
        f"{100 * share_of_bytes(cell, 'fed-sb', 'fedavg'):.0f} % ({cell.split})" for cell in rules.cells
    )
    doubled = fmean(share_of_bytes(cell, "scaffold", "fedavg") for cell in drift.cells)
    best, rival = (rates[name].worst for name in ("copra", "lora"))
    layers = json.loads(sorted(RESULTS.glob("elastic-fashion-*.json"))[-1].read_text(encoding="utf-8"))
    pruned, repaired = (
        POINTS.show(elastic_gain(layers, method, state, "as trained", ["0.25"]))
        for method, state in (("copra", "as trained"), ("lora", "repaired"))
    )
    rows = [
        [
            "none",
            'LoRA, `optimizer-state = "client"`',
            f"{gains(rules, 'fedavg', 'fedavg+fresh')} points over a new optimizer in each round, for no bytes",
            f"`{rules.command}`",
        ],
        [
            "bytes are cheap",
            'LoRA, `optimizer-state = "client"`, `control-variates = true` (method `scaffold`)',
            f"{gains(drift, 'scaffold', 'fedavg')} points over the row above, for {doubled:.1f} times the bytes",
            f"`{drift.command}`",
        ],
        [
            "rounds are few or slow, or clients cannot keep state",
            'LoRA, `optimizer-state = "shared"`',
            f"{POINTS.show(gain(cell, 'lora+shared', 'lora+fresh'))} points over a new optimizer, "
            f"{POINTS.show(gain(cell, 'lora+shared', 'lora'))} over moments that clients keep (tweets), for "
            f"{times:.1f} times the bytes",
            f"`{moments.command}`",
        ],
        [
            "bytes up and down",
            'LoRA, `optimizer-state = "client"`, more and shorter rounds',
            f"level with shared moments at the same steps and {100 * more:.0f} % more bytes, in 3.3 times the rounds: "
            f"shared minus kept is {gains(equal_bytes, 'lora+shared', 'lora')} points",
            f"`{equal_bytes.command}`",
        ],
        [
            "bytes up",
            'LoRA, `uplink-dtype = "int8"`, four times the rounds',
            f"{gains(uplink, 'int8', 'lora')} points over float32 at the same MB up (with a fifth more steps)",
            f"`{uplink.command}`",
        ],
        [
            "bytes up and down, about a tenth of FedAvg's, and the server has labeled data",
            'LoRA, `rule = "fed-sb"`',
            f"{gains(rules, 'fed-sb', 'fedavg')} points against FedAvg at the same rounds, with {shares} of the bytes",
            f"`{rules.command}`",
        ],
        [
            "weak clients: little memory, slow processors",
            "LoRA, `client-depths` (method `top-layers`)",
            f"{gains(depths, 'depth-tiers+examples', 'strong-clients+examples')} points over leaving them out; "
            f"{gains(depths, 'depth-tiers+examples', 'lora')} against clients that could all train everything",
            f"`{depths.command}`",
        ],
        [
            "devices keep a third of the layers, and cannot repair them",
            "CopRA",
            f"{pruned} points over LoRA with 2 of 6 layers (fashion); one epoch of repair for each subset would buy "
            f"LoRA {repaired}",
            f"`{layers['command']}`",
        ],
        [
            "the learning rate cannot be tuned and may be far too high",
            "CopRA",
            f"{100 * best:.1f} % in place of {100 * rival:.1f} % at the worst rate that all methods tried "
            "(validation data, no interval; mean of three regimes, in one of which LoRA's is better)",
            f"`{headline.command}`",
        ],
    ]
    return DataTable(["your constraint", "use", "what it buys", "found by"], rows)


def gain(cell: CellResults, method: str, rival: str) -> Estimate:
    """Return the test accuracy of `method` minus that of `rival`, paired by seed."""
    pairs = zip(*(cell.methods[name].get("test_accuracy").values for name in (method, rival)), strict=True)
    return estimate([None if a is None or b is None else a - b for a, b in pairs])


def gains(results: StudyResults, method: str, rival: str) -> str:
    """Return `gain` in points for each cell, with the name of its data split."""
    return join_words(f"{POINTS.show(gain(cell, method, rival))} ({cell.split})" for cell in results.cells)


def share_of_bytes(cell: CellResults, method: str, rival: str) -> float:
    """Return the bytes up and down of `method` divided by those of `rival`, with one client per node."""
    up, down = ([cell.methods[name].get(metric).mean or 0 for name in (method, rival)] for metric in BYTES)
    ours, theirs = (sent + CLIENTS_PER_NODE * received for sent, received in zip(up, down, strict=True))
    return ours / theirs


def plain(shown: DataTable) -> str:
    """Return a table as Markdown without its title, which the page has as a heading."""
    return replace(shown, title="").markdown()


def source(path: Path, command: str) -> str:
    """Return the sentence below a table: its file, and the command that wrote the file."""
    return f"From `experiments/results/{path.name}`.\nCommand: `{command}`."


def traffic(results: StudyResults) -> DataTable:
    """Return test accuracy and bytes of every method, the most accurate of each cell first."""
    rows = []
    for cell in results.cells:
        for name in sorted(cell.methods, key=lambda name: -(cell.methods[name].get("test_accuracy").mean or 0)):
            method = cell.methods[name]
            up, down = (f"{(method.get(metric).mean or 0) / 1e6:.1f}" for metric in BYTES)
            against = POINTS.show(cell.differences[name].get(POINTS.metric)) if name in cell.differences else ""
            rate, accuracy = f"{cell.rates[name].chosen:g}", TEST_ACCURACY.show(method.get("test_accuracy"))
            rows.append([figures.label(cell), name, rate, accuracy, against, up, down])
    difference = f"minus {results.cells[0].baseline}, points"
    return DataTable(["cell", "method", "rate", "test accuracy, %", difference, "MB up", "MB down"], rows)


def copra_against(results: StudyResults) -> DataTable:
    """Return CopRA minus each other method, paired by seed, with one row per cell of the grid."""
    rivals = [method for method in results.cells[0].methods if method != "copra"]
    rows = []
    for cell in results.cells:
        rows.append([figures.label(cell), *(POINTS.show(gain(cell, "copra", rival)) for rival in rivals)])
    return DataTable(["copra minus, points", *rivals], rows)


def predictors(results: StudyResults) -> DataTable:
    """Return correlations of measures of averaging with the gain over the baseline, over all methods with adapters."""
    rows = []
    for metric, name in METRICS.items():
        gains = figures.gains_against(results, metric)
        if not gains:
            continue
        correlation = figures.pearson(gains)
        shown = "no spread" if correlation is None else with_minus(correlation, "+.2f")
        rows.append([name, shown, str(sum(map(len, gains.values())))])
    return DataTable(
        ["difference from the baseline", "Pearson correlation with the gain in test accuracy", "pairs of runs"], rows
    )


def papers(facts: Mapping[str, Any]) -> DataTable:
    """Return the measures of the papers' claims, LoRA and CopRA outside a federation."""
    rows = []
    for measure in PAPERS_MEASURES:
        lora, copra, difference = (Estimate(**estimated) for estimated in facts["measures"][measure].values())
        plain = column(measure)
        cells = [plain.show(lora), plain.show(copra), column(measure, "+").show(difference)]
        rows.append([measure, *cells, PUBLISHED.get(measure, "")])
    return DataTable(
        ["measure (%, points; barriers in nats)", "lora", "copra", "copra − lora", "published elsewhere"], rows
    )


def elastic(facts: Mapping[str, Any]) -> DataTable:
    """Return accuracies by share of the layers and the elastic score: one row per method and state of its adapters.

    The last columns are the differences from the rival's adapters as trained and repaired, paired by seed.
    """
    measured: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]] = facts["measured"]
    rival, *_ = measured
    shares = list(measured[rival][0]["repaired"])
    rows = []
    for method, runs in measured.items():
        for state in runs[0]:
            by_share = [f"{100 * fmean(scores[state][share] for scores in runs):.1f}" for share in shares]
            differences = [
                "" if (method, state) == (rival, other) else POINTS.show(elastic_gain(facts, method, state, other))
                for other in ("as trained", "repaired")
            ]
            score = TEST_ACCURACY.show(estimate([fmean(scores[state].values()) for scores in runs]))
            rows.append([method, state, *by_share, score, *differences])
    headings = [f"{float(share):.0%} of the layers" for share in shares]
    against = [f"minus {rival} {state}, points" for state in ("as trained", "repaired")]
    return DataTable(["method", "adapter", *headings, "elastic score, %", *against], rows)


def elastic_gain(
    facts: Mapping[str, Any], method: str, state: str, rival_state: str, shares: Sequence[str] = ()
) -> Estimate:
    """Return the mean over `shares` (default: all) of a method's adapters minus that of the first method's, paired."""
    rival, *_ = facts["measured"].values()
    pairs = [(ours[state], theirs[rival_state]) for ours, theirs in zip(facts["measured"][method], rival, strict=True)]
    return estimate([fmean(ours[share] - theirs[share] for share in shares or ours) for ours, theirs in pairs])


def images(page: str) -> Iterator[tuple[str, Figure]]:
    """Yield file name and figure of every image in `page`."""
    for name, (_, results) in studies().items():
        for kind, charts in (("gains", figures.gains(results)), ("accuracies", figures.accuracies(results))):
            if (file := f"findings-{name}-{kind}.svg") in page:
                yield file, charts[0]


def filled(page: str) -> str:
    """Return `page` with the current content of its blocks. Raises KeyError for a block without results."""
    content = dict(blocks())
    return BLOCK.sub(lambda block: f"{block[1]}{content[block['name']]}{block[3]}", page)


def write(
    page: Path, fill: Callable[[str], str], images: Callable[[str], Iterable[tuple[str, Figure]]], height: int
) -> None:
    """Run the command of a page: renew the blocks of `page`, or of the file that it names, and the charts shown there.

    `fill` is a module's `filled`, `images` its `images`.
    """
    parser = argparse.ArgumentParser(description=f"Write tables and charts of {page.name} from committed results.")
    parser.add_argument("page", nargs="?", type=Path, default=page, help="default: the page of the documentation")
    path = parser.parse_args().page
    written = fill(path.read_text(encoding="utf-8"))
    path.write_text(written, encoding="utf-8")
    for file, figure in images(written):
        figure.chart.write_image(path.parent.parent / "images" / file, width=900, height=height)


if __name__ == "__main__":
    write(PAGE, filled, images, height=380)
