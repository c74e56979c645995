"""The report of a run or a comparison: one self-contained page.

`write` reads a folder, `sections` arranges figures and tables, `render` makes the page of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from copra_fl.config import toml_value
from copra_fl.files import atomic_write
from copra_fl.records import ComparisonSummary, ConfigValue, LinePath, Provenance
from copra_fl.reporting import html
from copra_fl.reporting.data_table import NO_VALUE, DataTable
from copra_fl.reporting.figures import averaging, classes, clients, cost, learning
from copra_fl.reporting.html import Figure, Section
from copra_fl.reporting.results import Comparison, load_comparison, without_folders
from copra_fl.reporting.statistics import Value, metrics, partition_settings, summarize
from copra_fl.reporting.tables import (
    AGGREGATION_ERROR,
    BALANCED_ACCURACY,
    CLIENT_ACCURACY,
    COST,
    ERROR_OF_CHANGE,
    MACRO_F1,
    MERGE_GAP,
    OPTIONAL_COLUMNS,
    TEST_ACCURACY,
    TEST_LOSS,
    VALIDATION_ACCURACY,
    WORK,
    Column,
    barrier_note,
    client_accuracy_note,
    dataset_tables,
    early_ends,
    measured,
    merge_gap_note,
    no_better_than_majority,
    optional_columns,
    results_table,
    rows,
    target_table,
    work_table,
)
from copra_fl.reporting.verdict import verdict
from copra_fl.reporting.work import work_by_depth
from copra_fl.wording import join_words, listed

RESULT_COLUMNS = (TEST_ACCURACY, MACRO_F1, CLIENT_ACCURACY, AGGREGATION_ERROR, ERROR_OF_CHANGE, MERGE_GAP, *COST)
CONNECTIVITY_COLUMNS = (
    Column("barrier (Entezari), loss", "barrier_entezari", spec="+.3f"),
    Column("barrier (Frankle), loss", "barrier_frankle", spec="+.3f"),
    Column("midpoint gap, points", "midpoint_gap", scale=100, spec="+.1f"),
)
RUN_COLUMNS = (
    TEST_ACCURACY,
    TEST_LOSS,
    MACRO_F1,
    BALANCED_ACCURACY,
    VALIDATION_ACCURACY,
    Column("validation loss", "validation_loss", spec=".3f"),
    CLIENT_ACCURACY,
    AGGREGATION_ERROR,
    ERROR_OF_CHANGE,
    MERGE_GAP,
    Column("merge gap, loss", "merge_gap_loss", spec="+.3f"),
    *WORK,
)
#: sections whose tables are no results
TECHNICAL_SECTIONS = ("Configuration", "Provenance", "Notes of the aggregation rules", "Failures and data left out")
#: with more methods than this the title does not name them
MAX_IN_TITLE = 3


def write(directory: Path) -> ComparisonSummary:
    """Write ``report.html`` of the run or comparison in `directory`, and ``summary.json`` of a comparison.

    Raises ResultsError and ConfigError as `load_comparison` does.
    """
    comparison = load_comparison(directory)
    summary = summarize(comparison)
    if not comparison.is_single_run:  # the folder of a run has the run's own summary.json
        atomic_write(directory / "summary.json", summary.to_json(indent=2) + "\n")
    atomic_write(directory / "report.html", render(comparison, summary))
    return summary


def render(comparison: Comparison, summary: ComparisonSummary) -> str:
    """Return the page as HTML."""
    return html.render(
        title=_title(summary),
        setting=_setting(comparison, summary),
        verdict=verdict(summary).text,
        warnings=list(_warnings(comparison, summary)),
        results=[all_results(summary), *dataset_tables(summary)],
        sections=sections(comparison, summary),
    )


def figures_and_tables(directory: Path) -> tuple[list[html.Figure], list[tuple[str, DataTable]]]:
    """Return all figures of the report, and its tables of results with names for files.

    Raises ResultsError and ConfigError as `load_comparison` does.
    """
    comparison = load_comparison(directory)
    summary = summarize(comparison)
    arranged = sections(comparison, summary)
    of_datasets = enumerate(dataset_tables(summary), start=2)
    tables = [("results", all_results(summary)), *((f"results {number}", table) for number, table in of_datasets)]
    for section in arranged:
        if section.title not in TECHNICAL_SECTIONS:
            tables += [(f"{section.title} {table.title}", table) for table in section.tables]
    return named_figures(arranged), tables


def sections(comparison: Comparison, summary: ComparisonSummary) -> list[Section]:
    """Return everything below the results, in reading order, without the sections that the runs have no data for."""
    arranged = [
        Section("Learning", learning.learning(comparison)),
        Section("Classes", classes.confusions(comparison)),
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
        Section("Layers switched on", [*learning.schedule(comparison), *learning.activity_maps(comparison)]),
        Section("Clients", [*clients.client_accuracy(comparison), *clients.client_examples(comparison)]),
        Section(
            "Cost",
            [
                *cost.accuracy_for_cost(summary),
                *cost.accuracy_for_bytes(comparison),
                *cost.traffic_and_time(comparison),
            ],
            [*target_table(summary), work_table(summary), *_work_by_depth(comparison)],
        ),
        *_probes(comparison),
        Section("Differential privacy", tables=_privacy(comparison)),
        Section("Results of each class", tables=classes.class_tables(comparison), collapsed=True),
        Section("Results of each run", tables=_each_run(comparison, summary), collapsed=True),
        Section("Configuration", tables=_settings(summary), collapsed=True),
        Section("Provenance", tables=_provenance(comparison), collapsed=True),
        Section("Notes of the aggregation rules", tables=_notes(comparison), collapsed=True),
        Section("Failures and data left out", tables=_failures(comparison), collapsed=True),
    ]
    return [section for section in arranged if section.figures or section.tables]


def titled_figures(comparison: Comparison) -> dict[str, go.Figure]:
    """Return the charts of the report by title, each with its title in it."""
    figures = named_figures(sections(comparison, summarize(comparison)))
    return {figure.title: html.titled(figure) for figure in figures}


def named_figures(arranged: Sequence[Section]) -> list[Figure]:
    """Return the figures of all sections. A title that has occurred before, as those of probes do, gets a number."""
    times: Counter[str] = Counter()
    figures = []
    for figure in (figure for section in arranged for figure in section.figures):
        times[figure.title] += 1
        number = times[figure.title]
        figures.append(figure if number == 1 else replace(figure, title=f"{figure.title}, {number}"))
    return figures


def results_html(comparison: Comparison) -> str:
    """Return the table of results and the verdict as HTML, for a notebook."""
    summary = summarize(comparison)
    table = all_results(summary)
    frame = pd.DataFrame([list(row) for row in table.rows], columns=list(table.header))
    return f"{frame.to_html(index=False, border=0)}<p>{escape(table.caption)}</p><p>{escape(verdict(summary).text)}</p>"


def _title(summary: ComparisonSummary) -> str:
    baseline, others = summary.baseline, list(summary.differences)
    if not others:
        return baseline
    return f"{join_words(others) if len(others) < MAX_IN_TITLE else f'{len(others)} methods'} against {baseline}"


def _setting(comparison: Comparison, summary: ComparisonSummary) -> str:
    """Return model, data, split and length of the runs in one line."""
    settings: dict[str, ConfigValue] = dict.fromkeys(summary.settings.differing, "varying")
    settings |= summary.settings.common
    num_clients = f"{settings['num-clients']} clients" if settings["num-clients"] else "one client per node"
    split = f"{settings['partitioner']} split"
    if settings["partitioner"] == "dirichlet":
        split += f", alpha {settings['alpha']}"
    rounds = f"{settings['num-rounds']} {'round' if settings['num-rounds'] == 1 else 'rounds'}"
    unit = "local-epochs" if settings["local-epochs"] else "local-steps"
    length = f"{settings[unit]} {unit.replace('-', ' ')}{_passes(summary)}"
    return (
        f"{without_folders(settings['model'])} on {without_folders(settings['dataset'])} · {num_clients}, {split} · "
        f"{rounds} of {length} · {comparison.named_seeds}"
    )


def _passes(summary: ComparisonSummary) -> str:
    """Return the range of passes over own data in all runs, in parentheses; empty before a run has finished."""
    values = [
        [value for estimates in summary.methods.values() for value in estimates.get(metric).values if value is not None]
        for metric in ("passes_lowest", "passes_highest")
    ]
    if not all(values):
        return ""
    low, high = f"{min(values[0]):.2f}", f"{max(values[1]):.2f}"
    return f" ({low if low == high else f'{low} to {high}'} passes over a client's own data)"


def _warnings(comparison: Comparison, summary: ComparisonSummary) -> Iterator[str]:
    started = [run for run in summary.unfinished if run.rounds]
    if started:
        names = join_words(f"{run.method} seed {run.seed} ({run.rounds} rounds finished)" for run in started)
        yield f"Unfinished runs, shown only in the charts by round: {names}."
    if not_started := len(summary.unfinished) - len(started):
        yield f"Runs without a finished round: {not_started}."
    missing = sum(len(record.missing) for _, run in comparison.runs for record in run.journal)
    yield from no_better_than_majority(summary)
    yield from early_ends(summary)
    if missing:
        yield f"Missing replies of clients: {missing}. The reasons are at the end of the page."


def all_results(summary: ComparisonSummary) -> DataTable:
    """Return the table of all columns."""
    accuracy, *others = RESULT_COLUMNS
    optional = optional_columns(summary)
    has_held_out = any(column.metric.startswith("held_out") for column in optional)
    of_classes = "Macro-F1: mean F1 of the classes, so that a class that is never found counts, however rare it is. "
    caption = (
        "After the last round. No client has seen the test data. "
        f"{of_classes if measured([MACRO_F1], [summary]) else ''}"
        f"Client accuracy: on the clients' validation data.{client_accuracy_note(summary.settings.common)} "
        f"{'Held-out clients took no part in training. ' if has_held_out else ''}"
        "Aggregation error (lower is closer, 0 is exact): relative error of the new global adapter against the average "
        "of the clients' products B A, mean over rounds; also relative to the change of that average in the round. "
        "Merge gap (above 0 is good): accuracy of the averaged model minus the mean of the clients' models before "
        f"averaging.{merge_gap_note(summary.settings.common)}"
    )
    return results_table(summary, (accuracy, *optional, *others), caption)


def _work_by_depth(comparison: Comparison) -> list[DataTable]:
    """Return the work of a client of each depth, in the methods with ``client-depths``."""
    cells = [
        [
            method,
            str(work.depth),
            f"{work.clients:.1f}",
            f"{work.seconds:.2f}",
            f"{work.memory / 1e6:.1f}",
            NO_VALUE if work.flops is None else f"{work.flops / 1e9:.1f}",
        ]
        for method in comparison.methods
        for work in work_by_depth(comparison.finished_runs(method))
    ]
    caption = (
        "Of a client in a round, mean over rounds. Memory: most bytes that autograd kept for the backward pass of a "
        "step."
    )
    header = ["method", "layers trained", "clients a round", "seconds", "memory, MB", "GFLOP"]
    return [DataTable(header, cells, caption, title="Work by depth")] if cells else []


def _connectivity(comparison: Comparison, summary: ComparisonSummary) -> list[DataTable]:
    if not any(finished.paths for method in comparison.methods for _, finished in comparison.finished(method)):
        return []
    caption = (
        "Entezari: highest loss above the straight line between the losses of the ends. Frankle: highest loss above "
        "the mean of the ends. Midpoint gap: accuracy at u = 0.5 minus the mean of the ends. Means over pairs of "
        f"clients, then over seeds.{barrier_note(summary.settings.common)}"
    )
    headings = [column.heading for column in CONNECTIVITY_COLUMNS]
    return [DataTable(["method", *headings], rows(summary, CONNECTIVITY_COLUMNS), caption)]


def _probes(comparison: Comparison) -> Iterator[Section]:
    """Yield the figures that `copra-fl probe` has written to the folder and to those of its runs."""
    folders = dict.fromkeys([comparison.directory, *(run.directory for _, run in comparison.runs)])
    for path in (path for folder in folders for path in sorted(folder.glob("probe-*.figures.json"))):
        yield html.read_section(path)


def _each_run(comparison: Comparison, summary: ComparisonSummary) -> list[DataTable]:
    columns = measured((*RUN_COLUMNS, *OPTIONAL_COLUMNS), [summary])
    finished = [(method, run.seed, run) for method in comparison.methods for run in comparison.finished_runs(method)]
    runs = [
        [method, str(seed), *(column.format(values[column.metric]) for column in columns)]
        for method, seed, run in finished
        for values in [metrics(run)]
    ]
    pairs = [
        [method, str(seed), join_words(path.clients), *_path_cells(path)]
        for method, seed, run in finished
        if run.summary
        for path in run.summary.paths
    ]
    tables = [
        DataTable(["method", "seed", *(column.heading for column in columns)], runs, title="Runs"),
        DataTable(
            ["method", "seed", "clients", *(column.heading for column in CONNECTIVITY_COLUMNS)],
            pairs,
            title="Pairs of clients",
        ),
    ]
    return [table for table in tables if table.rows]


def _path_cells(path: LinePath) -> list[str]:
    values = (path.barrier_entezari, path.barrier_frankle, path.midpoint_gap)
    return [column.format(value) for column, value in zip(CONNECTIVITY_COLUMNS, values, strict=True)]


def _settings(summary: ComparisonSummary) -> list[DataTable]:
    return _partitioned("setting", "method", summary.settings.common, summary.settings.differing, toml_value)


def _provenance(comparison: Comparison) -> list[DataTable]:
    common, differing = partition_settings(
        {
            f"{method}, seed {run.seed}": dict(_provenance_fields(run.provenance))
            for method, run in comparison.runs
            if run.provenance
        }
    )
    return _partitioned("field", "run", common, differing, str)


def _partitioned(
    kind: str,
    owner_kind: str,
    common: Mapping[str, Value],
    differing: Mapping[str, Mapping[str, Value | None]],
    to_text: Callable[[Value], str],
) -> list[DataTable]:
    """Return a table of the differing values by owner, if there are any, and one of the common values."""

    def text(value: Value | None) -> str:
        return NO_VALUE if value is None else to_text(value)

    equal = DataTable([kind, "value"], [[key, text(value)] for key, value in common.items()])
    if not differing:
        return [equal]
    owners = list(next(iter(differing.values())))
    if len(owners) <= len(differing):
        header, cells = [kind, *owners], [[key, *map(text, values.values())] for key, values in differing.items()]
    else:
        header = [owner_kind, *differing]
        cells = [[owner, *(text(values[owner]) for values in differing.values())] for owner in owners]
    different = DataTable(header, cells, title=f"Different between {owner_kind}s")
    return [different, replace(equal, title=f"Equal in all {owner_kind}s")]


def _provenance_fields(provenance: Provenance) -> Iterator[tuple[str, object]]:
    yield "run id", provenance.run
    yield "seed", provenance.seed
    starts = {"start": provenance.start} | {f"resume {n}": o for n, o in enumerate(provenance.resumes, start=1)}
    for name, origin in starts.items():
        for field, value in origin.model_dump().items():
            if isinstance(value, dict):
                yield from ((f"{name}, {field}: {key}", detail) for key, detail in value.items())
            else:
                yield f"{name}, {field.replace('_', ' ')}", value


def _privacy(comparison: Comparison) -> list[DataTable]:
    """Return the privacy that each private run has spent."""
    spent = [
        [
            method,
            str(run.seed),
            f"{privacy.epsilon:.3f}",
            "no limit" if privacy.server_epsilon is None else f"{privacy.server_epsilon:.3f}",
            f"{privacy.delta:g}",
            f"{privacy.noise_multiplier:g}",
            f"{privacy.sampling_rate:g}",
        ]
        for method, run in comparison.runs
        if run.journal and (privacy := run.journal[-1].privacy)
    ]
    header = ["method", "seed", "epsilon, who sees models", "epsilon, server", "delta", "noise", "sampling rate"]
    caption = (
        "The first epsilon is towards those who see models but not who was sampled: users and other nodes. The second "
        "is towards the server, which samples; there is no limit where it sees updates without noise."
    )
    return [DataTable(header, spent, caption)] if spent else []


def _notes(comparison: Comparison) -> list[DataTable]:
    notes = [
        [method, str(run.seed), str(record.round), json.dumps(record.notes)]
        for method, run in comparison.runs
        for record in run.journal
        if record.notes
    ]
    return [DataTable(["method", "seed", "round", "note"], notes)] if notes else []


def _failures(comparison: Comparison) -> list[DataTable]:
    missing = [
        [method, str(run.seed), str(record.round), str(client.client), client.reason]
        for method, run in comparison.runs
        for record in run.journal
        for client in record.missing
    ]
    left_out = [
        [
            method,
            str(seed),
            listed(summary.skipped_clients) or "none",
            str(summary.unassigned_examples),
            str(summary.dropped_duplicates),
            str(summary.dropped_empty),
        ]
        for method in comparison.methods
        for seed, summary in comparison.finished(method)
    ]
    tables = [
        DataTable(["method", "seed", "round", "client", "reason of the missing reply"], missing),
        DataTable(
            [
                "method",
                "seed",
                "clients without training data",
                "examples without a client",
                "held-out examples that a client has too",
                "rows without content, label or client",
            ],
            left_out,
        ),
    ]
    return [table for table in tables if table.rows]
