"""`copra-fl probe prune`: what accuracy is left when a run's adapter is pruned."""

from __future__ import annotations

from collections.abc import Sequence

from copra_fl.probes import pruned_adapters
from copra_fl.probes.charts import UNITS
from copra_fl.probes.exported import METRICS, Game, solve, wholes
from copra_fl.probes.findings import Findings, origin, setting
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split
from copra_fl.probes.pruned_adapters import Pruned
from copra_fl.probes.shapley import folded
from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import HEIGHT, DataTable, Figure, Section, empty_chart
from copra_fl.wording import join_words

#: a run's prunings with what each scores
Scored = list[tuple[Pruned, Metrics]]

CURVES = {
    "Shapley order": (
        "Layers in the order of their value",
        "Layers are kept in the order of their Shapley values (minus loss, server-validation data), largest first.",
    ),
    "magnitude": (
        "Largest values",
        "The largest values in magnitude over the whole adapter are kept, all others are zero.",
    ),
}
SETS = ("ends", "layers", "module")


def probe(
    runs: Sequence[OpenRun], split: Split, standard_error: float, max_pairs: int, seed: int, progress: Progress
) -> Findings:
    """Each run's adapter, pruned in every way, on held-out data; the order of layers is from validation data always."""
    scored: dict[str, Scored] = {}
    for whole in wholes(runs):
        layers = pruned_adapters.layers(whole.adapter)
        game = Game(whole, list(layers.values()), "server-validation", progress)
        worth = solve(game, standard_error, max_pairs, seed)["loss"]
        prunings = [
            *pruned_adapters.ends(whole.adapter),
            *pruned_adapters.layer_sets(whole.adapter),
            *pruned_adapters.single_modules(whole.adapter),
            *pruned_adapters.in_order(whole.adapter, dict(zip(layers, worth.values.tolist(), strict=True))),
            *pruned_adapters.magnitudes(whole.adapter),
        ]
        metrics = whole.score([pruned.adapter for pruned in prunings], split, "prunings", progress)
        scored[whole.run.name] = list(zip(prunings, metrics, strict=True))
    order = "order of layers by Shapley values of minus loss on server-validation"
    return Findings(
        probe="prune",
        title=f"What is left when pruned: {join_words(scored)}",
        setting=setting(runs, split, order, f"seed {seed}"),
        verdict=_verdict(scored),
        results=_table(scored, "accuracy"),
        facts=origin(runs, split) | {"seed": seed, "prunings": [_facts(run, each) for run, each in scored.items()]},
        sections=[
            Section("By what is kept", [_curve(scored, family, metric) for metric in METRICS for family in CURVES]),
            Section("Sets of layers, single modules", [_bars(scored, metric) for metric in METRICS]),
            Section("Losses", tables=[_table(scored, "loss")], collapsed=True),
        ],
        warnings=[folded(run) for run in runs if run.residual],
    )


def _verdict(scored: dict[str, Scored]) -> str:
    def left(run: str, name: str) -> str:
        by_name = {pruned.name: 100 * metrics["accuracy"] for pruned, metrics in scored[run]}
        return f"{run} {by_name['everything']:.1f} to {by_name[name]:.1f}"

    every_other = join_words(left(run, "every other layer") for run in scored)
    half = join_words(left(run, "largest 50%") for run in scored)
    return f"Accuracy in %, every other layer kept: {every_other}; the larger half of the values kept: {half}."


def _table(scored: dict[str, Scored], metric: str) -> DataTable:
    """A row a pruning, a column a run."""
    unit, scale = UNITS[metric]
    rows: dict[str, list[str]] = {}
    for column, (_, each) in enumerate(scored.items()):
        for pruned, metrics in each:
            row = rows.setdefault(pruned.name, [f"{100 * pruned.kept:.0f}", *["–"] * len(scored)])
            row[1 + column] = f"{scale * metrics[metric]:.{1 if metric == 'accuracy' else 3}f}"
    caption = f"Cells: {unit}. Kept: share of the values of A and B; the head is always kept."
    return DataTable([f"kept ({unit})", "kept, %", *scored], [[name, *cells] for name, cells in rows.items()], caption)


def _curve(scored: dict[str, Scored], family: str, metric: str) -> Figure:
    what, how = CURVES[family]
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": "kept, % of values", "range": [-3, 103]}, {"title": unit})
    looks = styles(scored)
    for run, each in scored.items():
        points = sorted(
            (100 * pruned.kept, scale * metrics[metric], pruned.name)
            for pruned, metrics in each
            if pruned.family in (family, "ends")
        )
        chart.add_scatter(
            x=[kept for kept, _, _ in points],
            y=[value for _, value, _ in points],
            text=[name for _, _, name in points],
            name=run,
            mode="lines+markers",
            line={"color": looks[run].color, "dash": looks[run].dash},
            marker={"symbol": looks[run].symbol, "size": 8},
            hovertemplate="%{text}: %{y:.3g}",
        )
    caption = f"{how} At 0 the head alone, at 100 the whole adapter."
    return Figure(f"{what}, {metric}", caption, chart)


def _bars(scored: dict[str, Scored], metric: str) -> Figure:
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": unit}, {"type": "category", "autorange": "reversed"})
    looks = styles(scored)
    rows = 0
    for run, each in scored.items():
        shown = [(pruned, metrics) for pruned, metrics in each if pruned.family in SETS]
        rows = max(rows, len(shown))
        chart.add_bar(
            orientation="h",
            x=[scale * metrics[metric] for _, metrics in shown],
            y=[pruned.name for pruned, _ in shown],
            name=run,
            marker={"color": looks[run].color},
            customdata=[100 * pruned.kept for pruned, _ in shown],
            hovertemplate="%{x:.3g}, %{customdata:.0f} % of values kept",
        )
    chart.update_layout(height=max(HEIGHT, 100 + rows * (12 + 14 * len(scored))))
    caption = "Only these adapters are on, as they were trained, together with the head; nothing is trained again."
    return Figure(f"Layers and modules kept, {metric}", caption, chart)


def _facts(run: str, scored: Scored) -> dict[str, object]:
    return {
        "run": run,
        "points": [
            {"family": pruned.family, "name": pruned.name, "kept": pruned.kept} | metrics for pruned, metrics in scored
        ],
    }
