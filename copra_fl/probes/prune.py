"""`copra-fl probe prune`: score a run's adapter after pruning layers, modules or small values."""

from __future__ import annotations

from collections.abc import Sequence

from copra_fl.probes import pruned_adapters
from copra_fl.probes.charts import UNITS
from copra_fl.probes.exported import METRICS, Game, export_runs, solve
from copra_fl.probes.findings import Findings, setting_facts, setting_line
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split
from copra_fl.probes.pruned_adapters import Pruned
from copra_fl.probes.shapley import folded_residual_warning
from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import HEIGHT, Figure, Section, empty_chart
from copra_fl.reporting.tables import DataTable
from copra_fl.wording import join_words

#: the prunings of a run with their metrics
Scored = list[tuple[Pruned, Metrics]]

#: family of prunings -> title and caption of its curve
CURVES = {
    "Shapley order": (
        "Layers by Shapley value",
        "The layers of largest Shapley value are kept (minus loss, server-validation data).",
    ),
    "magnitude": (
        "Values by magnitude",
        "The values of largest magnitude over the whole adapter are kept, all others are set to zero.",
    ),
}
#: families of prunings that are shown as bars
BARS = ("ends", "layers", "module")


def probe(
    runs: Sequence[OpenRun], split: Split, standard_error: float, max_pairs: int, seed: int, progress: Progress
) -> Findings:
    """Score each run's adapter on held-out data after every kind of pruning.

    The order of layers by Shapley value always comes from the server's validation data, so that it is not chosen on the
    data of `split`.
    """
    scored_by_run: dict[str, Scored] = {}
    for exported in export_runs(runs):
        layers = pruned_adapters.layers(exported.adapter)
        game = Game(exported, list(layers.values()), "server-validation", progress)
        values = solve(game, standard_error, max_pairs, seed)["loss"].values
        prunings = [
            *pruned_adapters.ends(exported.adapter),
            *pruned_adapters.layer_sets(exported.adapter),
            *pruned_adapters.single_modules(exported.adapter),
            *pruned_adapters.in_order(exported.adapter, dict(zip(layers, values.tolist(), strict=True))),
            *pruned_adapters.magnitudes(exported.adapter),
        ]
        metrics = exported.score([pruned.adapter for pruned in prunings], split, "prunings", progress)
        scored_by_run[exported.run.name] = list(zip(prunings, metrics, strict=True))
    order = "layers ordered by Shapley values of minus loss on server-validation"
    return Findings(
        probe="prune",
        title=f"Pruning {join_words(scored_by_run)}",
        setting=setting_line(runs, split, order, f"seed {seed}"),
        verdict=_verdict(scored_by_run),
        results=_table(scored_by_run, "accuracy"),
        facts=setting_facts(runs, split)
        | {"seed": seed, "prunings": [_facts(run, scored) for run, scored in scored_by_run.items()]},
        sections=[
            Section(
                "Pruning curves", [_curve(scored_by_run, family, metric) for metric in METRICS for family in CURVES]
            ),
            Section("Sets of layers, and single modules", [_bars(scored_by_run, metric) for metric in METRICS]),
            Section("Losses", tables=[_table(scored_by_run, "loss")], collapsed=True),
        ],
        warnings=[folded_residual_warning(run) for run in runs if run.residual],
    )


def _verdict(scored_by_run: dict[str, Scored]) -> str:
    def change(run: str, name: str) -> str:
        accuracies = {pruned.name: 100 * metrics["accuracy"] for pruned, metrics in scored_by_run[run]}
        return f"{run} from {accuracies['whole adapter']:.1f} to {accuracies[name]:.1f}"

    every_other = join_words(change(run, "every other layer") for run in scored_by_run)
    half = join_words(change(run, "largest 50%") for run in scored_by_run)
    return f"Accuracy in % with every other layer kept: {every_other}; with the larger half of the values kept: {half}."


def _table(scored_by_run: dict[str, Scored], metric: str) -> DataTable:
    """Return one row per pruning, with one column per run."""
    unit, scale = UNITS[metric]
    rows: dict[str, list[str]] = {}
    for column, scored in enumerate(scored_by_run.values()):
        for pruned, metrics in scored:
            row = rows.setdefault(pruned.name, [f"{100 * pruned.kept:.0f}", *["–"] * len(scored_by_run)])
            row[1 + column] = f"{scale * metrics[metric]:.{1 if metric == 'accuracy' else 3}f}"
    caption = f"Cells: {unit}. Kept, %: share of the values of A and B that are kept; the head is always kept."
    cells = [[name, *row] for name, row in rows.items()]
    return DataTable([f"kept ({unit})", "kept, %", *scored_by_run], cells, caption)


def _curve(scored_by_run: dict[str, Scored], family: str, metric: str) -> Figure:
    title, family_caption = CURVES[family]
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": "kept, % of values", "range": [-3, 103]}, {"title": unit})
    run_styles = styles(scored_by_run)
    for run, scored in scored_by_run.items():
        points = sorted(
            (100 * pruned.kept, scale * metrics[metric], pruned.name)
            for pruned, metrics in scored
            if pruned.family in (family, "ends")
        )
        chart.add_scatter(
            x=[kept for kept, _, _ in points],
            y=[value for _, value, _ in points],
            text=[name for _, _, name in points],
            name=run,
            mode="lines+markers",
            line={"color": run_styles[run].color, "dash": run_styles[run].dash},
            marker={"symbol": run_styles[run].symbol, "size": 8},
            hovertemplate="%{text}: %{y:.3g}",
        )
    caption = f"{family_caption} 0 %: the head only; 100 %: the whole adapter."
    return Figure(f"{title}, {metric}", caption, chart)


def _bars(scored_by_run: dict[str, Scored], metric: str) -> Figure:
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": unit}, {"type": "category", "autorange": "reversed"})
    run_styles = styles(scored_by_run)
    num_rows = 0
    for run, scored in scored_by_run.items():
        shown = [(pruned, metrics) for pruned, metrics in scored if pruned.family in BARS]
        num_rows = max(num_rows, len(shown))
        chart.add_bar(
            orientation="h",
            x=[scale * metrics[metric] for _, metrics in shown],
            y=[pruned.name for pruned, _ in shown],
            name=run,
            marker={"color": run_styles[run].color},
            customdata=[100 * pruned.kept for pruned, _ in shown],
            hovertemplate="%{x:.3g}, %{customdata:.0f} % of values kept",
        )
    chart.update_layout(height=max(HEIGHT, 100 + num_rows * (12 + 14 * len(scored_by_run))))
    caption = "Only these modules of the trained adapter are active, with the head; nothing is trained again."
    return Figure(f"Layers and modules kept, {metric}", caption, chart)


def _facts(run: str, scored: Scored) -> dict[str, object]:
    return {
        "run": run,
        "points": [
            {"family": pruned.family, "name": pruned.name, "kept": pruned.kept} | metrics for pruned, metrics in scored
        ],
    }
