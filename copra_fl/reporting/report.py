"""One self-contained page that shows what a run or a comparison found.

`write` reads a folder, `sections` arranges figures and tables, `render` makes the page of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from copra_fl.config import toml_value
from copra_fl.files import atomic_write
from copra_fl.reporting import html
from copra_fl.reporting.figures import averaging, clients, cost, learning
from copra_fl.reporting.html import DataTable, Section
from copra_fl.reporting.results import Comparison, load_comparison
from copra_fl.reporting.statistics import metrics, partition_settings, summarize
from copra_fl.reporting.tables import (
    AGGREGATION_ERROR,
    CLIENT_ACCURACY,
    COST,
    MERGE_GAP,
    TEST_ACCURACY,
    TEST_LOSS,
    Column,
    also_measured,
    by_dataset,
    header_and_rows,
    note,
    rows,
)
from copra_fl.reporting.verdict import verdict
from copra_fl.wording import join_words

RESULT_COLUMNS = (TEST_ACCURACY, CLIENT_ACCURACY, AGGREGATION_ERROR, MERGE_GAP, *COST)
CONNECTIVITY_COLUMNS = (
    Column("barrier (Entezari), loss", "barrier_entezari", spec="+.3f"),
    Column("barrier (Frankle), loss", "barrier_frankle", spec="+.3f"),
    Column("midpoint gap, points", "midpoint_gap", scale=100, spec="+.1f"),
)
RUN_COLUMNS = (
    TEST_ACCURACY,
    TEST_LOSS,
    Column("validation accuracy, %", "validation_accuracy", scale=100),
    Column("validation loss", "validation_loss", spec=".3f"),
    CLIENT_ACCURACY,
    AGGREGATION_ERROR,
    MERGE_GAP,
    Column("merge gap, loss", "merge_gap_loss", spec="+.3f"),
    *COST,
)
#: with more methods than this the title does not name them
MAX_IN_TITLE = 3


def write(directory: Path) -> dict[str, Any]:
    """Write ``report.html``, and for a comparison ``summary.json``, from what is in `directory`.

    Returns the summary (see `results.summarise`). Raises ResultsError and ConfigError as `load_comparison` does.
    """
    comparison = load_comparison(directory)
    summary = summarize(comparison)
    if not comparison.is_single_run:  # whose summary.json is the run's own
        atomic_write(directory / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    atomic_write(directory / "report.html", render(comparison, summary))
    return summary


def render(comparison: Comparison, summary: Mapping[str, Any]) -> str:
    """The page, as HTML."""
    return html.render(
        title=_title(summary),
        setting=_setting(comparison, summary),
        verdict=verdict(summary),
        warnings=list(_warnings(comparison, summary)),
        results=[_results(summary), *_by_dataset(summary)],
        sections=sections(comparison, summary),
    )


def sections(comparison: Comparison, summary: Mapping[str, Any]) -> list[Section]:
    """Everything below the results, in reading order. What the runs did not record is left out."""
    arranged = [
        Section("Learning", learning.learning(comparison)),
        Section(
            "Aggregation",
            [
                *averaging.aggregation_error(comparison),
                *averaging.error_by_layer(comparison),
                *averaging.merge_gaps(comparison),
            ],
        ),
        Section(
            "On the line between two clients", averaging.connectivity(comparison), _connectivity(comparison, summary)
        ),
        Section("Adapters switched on", [*learning.schedule(comparison), *learning.activity_maps(comparison)]),
        Section("Clients", [*clients.client_accuracy(comparison), *clients.client_examples(comparison)]),
        Section("Cost", [*cost.accuracy_for_bytes(comparison), *cost.traffic_and_time(comparison)]),
        *_probes(comparison),
        Section("Each run", tables=_each_run(comparison, also_measured(summary)), collapsed=True),
        Section("Configuration", tables=_settings(summary), collapsed=True),
        Section("Provenance", tables=_provenance(comparison), collapsed=True),
        Section("What the rules noted", tables=_notes(comparison), collapsed=True),
        Section("Failures and data left out", tables=_failures(comparison), collapsed=True),
    ]
    return [section for section in arranged if section.figures or section.tables]


def _title(summary: Mapping[str, Any]) -> str:
    baseline, others = summary["baseline"], list(summary["differences"])
    if not others:
        return baseline
    return f"{baseline} against {join_words(others) if len(others) < MAX_IN_TITLE else f'{len(others)} other methods'}"


def _setting(comparison: Comparison, summary: Mapping[str, Any]) -> str:
    """One line for the page's head: model, data, split, length."""
    settings = {key: "varying" for key in summary["settings"]["differing"]} | summary["settings"]["common"]
    clients = f"{settings['num-clients']} clients" if settings["num-clients"] else "a client per node"
    split = f"{settings['partitioner']} split"
    if settings["partitioner"] == "dirichlet":
        split += f", alpha {settings['alpha']}"
    rounds = f"{settings['num-rounds']} {'round' if settings['num-rounds'] == 1 else 'rounds'}"
    unit = "local-epochs" if settings["local-epochs"] else "local-steps"
    length = f"{settings[unit]} {unit.replace('-', ' ')}"
    return (
        f"{settings['model']} on {settings['dataset']} · {clients}, {split} · "
        f"{rounds} of {length} · {comparison.named_seeds}"
    )


def _warnings(comparison: Comparison, summary: Mapping[str, Any]) -> Iterator[str]:
    begun = [run for run in summary["unfinished"] if run["rounds"]]
    if begun:
        unfinished = [f"{run['method']} seed {run['seed']} ({run['rounds']} rounds done)" for run in begun]
        yield f"Not finished, and so only in the figures by round: {join_words(unfinished)}."
    if waiting := len(summary["unfinished"]) - len(begun):
        yield f"Runs that have not finished a round: {waiting}."
    missing = sum(len(row["missing"]) for _, run in comparison.runs for row in run.journal)
    if missing:
        yield f"Missing replies of clients: {missing}. The reasons are at the end of the page."


def _results(summary: Mapping[str, Any]) -> DataTable:
    accuracy, *others = RESULT_COLUMNS
    also = also_measured(summary)
    held_out = "; held-out clients took no part" if any(column.metric.startswith("held_out") for column in also) else ""
    caption = (
        "After the last round. Test data is seen by no client; the clients' own data are their validation data"
        f"{held_out}. Aggregation error: what the new global adapter misses of the average of the clients' products, "
        f"mean over rounds. {note(summary)}"
    )
    return DataTable(*header_and_rows(summary, (accuracy, *also, *others)), caption)


def _by_dataset(summary: Mapping[str, Any]) -> list[DataTable]:
    header, cells = by_dataset(summary)
    caption = "The same test, on each data set by itself: above are means over data sets, each counting as much."
    return [DataTable(header, cells, caption)] if cells else []


def _connectivity(comparison: Comparison, summary: Mapping[str, Any]) -> list[DataTable]:
    if not any(end["paths"] for method in comparison.methods for _, end in comparison.finished(method)):
        return []
    caption = (
        "Entezari: highest loss above the straight line between the ends' losses. Frankle: highest loss above the mean "
        "of the ends. Midpoint gap: accuracy at u = 0.5 minus the mean of the ends. Mean over pairs, then over seeds."
    )
    return [
        DataTable(
            ["method", *(column.heading for column in CONNECTIVITY_COLUMNS)],
            rows(summary, CONNECTIVITY_COLUMNS),
            caption,
        )
    ]


def _probes(comparison: Comparison) -> Iterator[Section]:
    """What `copra-fl probe` has left in the folder and in those of its runs."""
    folders = dict.fromkeys([comparison.directory, *(run.directory for _, run in comparison.runs)])
    for path in (path for folder in folders for path in sorted(folder.glob("probe-*.figures.json"))):
        found = json.loads(path.read_text(encoding="utf-8"))
        yield Section(found["title"], html.unpack(found["figures"]))


def _each_run(comparison: Comparison, also: list[Column]) -> list[DataTable]:
    columns = (*RUN_COLUMNS, *also)
    finished = [(method, seed, end) for method in comparison.methods for seed, end in comparison.finished(method)]
    runs = [
        [method, str(seed), *(column.format(metrics(end)[column.metric]) for column in columns)]
        for method, seed, end in finished
    ]
    pairs = [
        [
            method,
            str(seed),
            join_words(path["clients"]),
            *(column.format(path[column.metric]) for column in CONNECTIVITY_COLUMNS),
        ]
        for method, seed, end in finished
        for path in end["paths"]
    ]
    found = [
        DataTable(["method", "seed", *(column.heading for column in columns)], runs),
        DataTable(["method", "seed", "clients", *(column.heading for column in CONNECTIVITY_COLUMNS)], pairs),
    ]
    return [table for table in found if table.rows]


def _settings(summary: Mapping[str, Any]) -> list[DataTable]:
    settings = summary["settings"]
    return [*_differing(settings["differing"], toml_value), _common(settings["common"], toml_value)]


def _provenance(comparison: Comparison) -> list[DataTable]:
    common, differing = partition_settings(
        {f"{method}, seed {run.seed}": dict(_flat(run.provenance)) for method, run in comparison.runs}
    )
    return [_common(common, str), *_differing(differing, str)]


def _common(common: Mapping[str, Any], text: Callable[[Any], str]) -> DataTable:
    return DataTable(["common", "value"], [[key, text(value)] for key, value in common.items()])


def _differing(differing: Mapping[str, Mapping[str, Any]], text: Callable[[Any], str]) -> list[DataTable]:
    """What differs: a row a key, or a row an owner where there are more of these."""
    if not differing:
        return []
    owners = list(next(iter(differing.values())))
    cells = {(key, owner): text(values[owner]) for key, values in differing.items() for owner in owners}
    if len(owners) > len(differing):
        return [
            DataTable(
                ["differing", *differing], [[owner, *(cells[key, owner] for key in differing)] for owner in owners]
            )
        ]
    return [DataTable(["differing", *owners], [[key, *(cells[key, owner] for owner in owners)] for key in differing])]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _notes(comparison: Comparison) -> list[DataTable]:
    noted = [
        [method, str(run.seed), str(row["round"]), json.dumps(row["notes"])]
        for method, run in comparison.runs
        for row in run.journal
        if row.get("notes")
    ]
    return [DataTable(["method", "seed", "round", "note"], noted)] if noted else []


LEFT_OUT = (
    "clients skipped (no training data)",
    "examples with no client",
    "held-out texts dropped (clients hold them too)",
    "rows dropped (no text, label or client)",
)


def _failures(comparison: Comparison) -> list[DataTable]:
    missing = [
        [method, str(run.seed), str(row["round"]), str(client["client"]), client["reason"]]
        for method, run in comparison.runs
        for row in run.journal
        for client in row["missing"]
    ]
    left_out = [
        [
            method,
            str(seed),
            ", ".join(map(str, end["skipped_clients"])) or "none",
            str(end["unassigned_examples"]),
            str(end["dropped_duplicates"]),
            str(end["dropped_empty"]),
        ]
        for method in comparison.methods
        for seed, end in comparison.finished(method)
    ]
    found = [
        DataTable(["method", "seed", "round", "client", "why its reply is missing"], missing),
        DataTable(["method", "seed", *LEFT_OUT], left_out),
    ]
    return [table for table in found if table.rows]
