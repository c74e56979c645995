"""`copra-fl probe shapley`: Shapley values of the layers or modules of adapters, and their concentration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from copra_fl.adapters.state import PEFT_PREFIX, Adapter
from copra_fl.probes import pruned_adapters
from copra_fl.probes.exported import METRICS, Game, export_runs, solve
from copra_fl.probes.findings import Findings, setting_facts, setting_line
from copra_fl.probes.open_run import OpenRun, Progress, Split
from copra_fl.probes.shapley_values import MAX_EXACT, ShapleyValues, gini, top_third
from copra_fl.reporting.data_table import DataTable, with_minus
from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import HEIGHT, Figure, Section, colorbar, empty_chart
from copra_fl.wording import join_words

#: metric -> name, unit, and factor to the unit shown
SHOWN = {"accuracy": ("accuracy", "points", 100.0), "loss": ("minus loss", "nats", 1.0)}


@dataclass(frozen=True)
class RunValues:
    """The Shapley values of a run's players, which are its layers or its modules, by metric.

    `layer_of` names the layer of each module.
    """

    run: str
    players: list[str]
    by_metric: dict[str, ShapleyValues]
    layer_of: dict[str, str]


def probe(
    runs: Sequence[OpenRun],
    split: Split,
    modules: bool,
    standard_error: float,
    max_pairs: int,
    seed: int,
    progress: Progress,
) -> Findings:
    """Compute the Shapley values of each run's layers and, with `modules`, of its single modules too."""
    players_by_kind = {"layer": pruned_adapters.layers, **({"module": _single_modules} if modules else {})}
    values_by_kind: dict[str, list[RunValues]] = {}
    for kind, players_of in players_by_kind.items():
        for exported in export_runs(runs):
            players = players_of(exported.adapter)
            game = Game(exported, list(players.values()), split, progress)
            solved = solve(game, standard_error, max_pairs, seed)
            layer_of = {
                short_name(module): short_name(layer)
                for layer, modules_of in pruned_adapters.layers(exported.adapter).items()
                for module in modules_of
            }
            values_by_kind.setdefault(kind, []).append(
                RunValues(exported.run.name, [short_name(name) for name in players], solved, layer_of)
            )
    evaluated = {kind: _evaluated(values, seed) for kind, values in values_by_kind.items()}
    sections = [
        section for kind, values in values_by_kind.items() for section in _sections(kind, values, evaluated[kind])
    ]
    facts = {"seed": seed, "requested_standard_error": standard_error} | {
        f"{kind}s": [_facts(run_values) for run_values in values] for kind, values in values_by_kind.items()
    }
    return Findings(
        probe="shapley",
        title=f"Shapley values: {join_words(run.name for run in runs)}",
        setting=setting_line(runs, split, *(f"{kind}s: {text}" for kind, text in evaluated.items())),
        verdict=_verdict(values_by_kind["layer"]),
        results=_results(values_by_kind),
        facts=setting_facts(runs, split) | facts,
        sections=sections,
        warnings=_warnings(runs, values_by_kind, standard_error),
    )


def short_name(module: str) -> str:
    """Return the name of a layer or module without PEFT's prefix."""
    return module.removeprefix(PEFT_PREFIX)


def _single_modules(adapter: Adapter) -> dict[str, list[str]]:
    return {module: [module] for module in pruned_adapters.adapted_modules(adapter)}


def _evaluated(values: Sequence[RunValues], seed: int) -> str:
    """Return the coalitions or orders from which the values were computed, for the page."""
    counts = dict.fromkeys(
        f"{2 * len(run_values.by_metric['accuracy'].orders)} orders, seed {seed}"
        if len(run_values.by_metric["accuracy"].orders)
        else f"all {2 ** len(run_values.players)} coalitions"
        for run_values in values
    )
    return join_words(counts)


def _verdict(values: Sequence[RunValues]) -> str:
    num_layers = len(values[0].players)
    even = -(-num_layers // 3) / num_layers
    shares = {run_values.run: top_third(run_values.by_metric["accuracy"].values) for run_values in values}
    return (
        f"Share of the Shapley mass of accuracy in the third of layers with the largest values: "
        f"{join_words(f'{run} {100 * share:.0f} %' for run, share in shares.items())}; "
        f"{100 * even:.0f} % if all layers have the same value."
    )


def _results(values_by_kind: dict[str, list[RunValues]]) -> DataTable:
    header = ["run", "players", "metric", "none", "all", "top third, %", "Gini"]
    rows = []
    for kind, values in values_by_kind.items():
        for metric, (name, _, scale) in SHOWN.items():
            for run_values in values:
                solved = run_values.by_metric[metric]
                rows.append(
                    [
                        run_values.run,
                        f"{len(run_values.players)} {kind}s",
                        f"{name}{', %' if scale > 1 else ''}",
                        with_minus(scale * solved.empty, ".3g"),
                        with_minus(scale * solved.grand, ".3g"),
                        f"{100 * top_third(solved.values):.1f}",
                        f"{gini(solved.values):.2f}",
                    ]
                )
    caption = (
        "None, all: the metric with no adapter active and with all; the head is always active. Top third: share of the "
        "third of players with the largest values in the mass, the sum of absolute Shapley values. Gini: 0 if all "
        "players have the same value, near 1 if one player has all. Sampling noise raises both slightly."
    )
    return DataTable(header, rows, caption)


def _sections(kind: str, values: Sequence[RunValues], evaluated: str) -> list[Section]:
    figures = [_bars(kind, values, metric, evaluated) for metric in METRICS]
    if kind == "module":
        figures += [heat_map for metric in METRICS for heat_map in _heat_maps(values, metric, evaluated)]
    tables = [_values(kind, values, metric) for metric in METRICS]
    return [
        Section(f"Shapley values of {kind}s", figures),
        Section(f"Shapley values of {kind}s as tables", tables=tables, collapsed=True),
    ]


def _bars(kind: str, values: Sequence[RunValues], metric: str, evaluated: str) -> Figure:
    name, unit, scale = SHOWN[metric]
    chart = empty_chart({"title": f"{name}, {unit}"}, {"type": "category"})
    chart.update_layout(height=max(HEIGHT, 100 + len(values[0].players) * (12 + 14 * len(values))))
    run_styles = styles(run_values.run for run_values in values)
    for run_values in values:
        solved = run_values.by_metric[metric]
        chart.add_bar(
            orientation="h",
            x=scale * solved.values,
            y=run_values.players,
            name=run_values.run,
            marker={"color": run_styles[run_values.run].color},
            error_x={"type": "data", "array": scale * solved.errors, "visible": bool(solved.errors.any())},
            hovertemplate=f"%{{y}}: %{{x:.3g}} {unit}",
        )
    caption = (
        f"Shapley value: the increase of {name} when the {kind}'s adapter is switched on, averaged over all orders of "
        f"switching on ({evaluated}). The values sum to the difference between all adapters and the head only. Error "
        "bars, for sampled orders: standard errors of the sampling, not of the held-out examples."
    )
    return Figure(f"Shapley values, {name}", caption, chart)


def _heat_maps(values: Sequence[RunValues], metric: str, evaluated: str) -> list[Figure]:
    """Return one map of layers by modules per run, all on one color scale."""
    name, unit, scale = SHOWN[metric]
    largest = scale * max(float(np.abs(run_values.by_metric[metric].values).max()) for run_values in values)
    caption = (
        f"Shapley value of each module in {name}, {unit}; lowest layer at the bottom ({evaluated}). All maps have one "
        "color scale."
    )
    maps = []
    for run_values in values:
        value_of = dict(zip(run_values.players, scale * run_values.by_metric[metric].values, strict=True))
        layer_of = run_values.layer_of
        layers = list(dict.fromkeys(map(layer_of.__getitem__, value_of)))
        kinds = list(dict.fromkeys(pruned_adapters.kind(player, layer_of[player]) for player in value_of))
        cells = {
            (layer_of[player], pruned_adapters.kind(player, layer_of[player])): float(value)
            for player, value in value_of.items()
        }
        chart = empty_chart({"type": "category"}, {"type": "category"})
        heat = go.Heatmap(
            x=kinds,
            y=layers,
            z=[[cells.get((layer, kind)) for kind in kinds] for layer in layers],
            zmin=-largest,
            zmax=largest,
            colorscale="RdBu",
            colorbar=colorbar(unit),
            hovertemplate=f"%{{y}}, %{{x}}: %{{z:.3g}} {unit}<extra></extra>",
        )
        chart.add_trace(heat)
        maps.append(Figure(f"Layers and modules of {run_values.run}, {name}", caption, chart))
    return maps


def _values(kind: str, values: Sequence[RunValues], metric: str) -> DataTable:
    name, unit, scale = SHOWN[metric]
    cells: dict[str, dict[str, str]] = {}
    for run_values in values:
        solved = run_values.by_metric[metric]
        cells[run_values.run] = {
            player: f"{scale * value:+.3f}" + (f" ± {scale * error:.3f}" if error else "")
            for player, value, error in zip(run_values.players, solved.values, solved.errors, strict=True)
        }
    players = dict.fromkeys(player for run_values in values for player in run_values.players)
    rows = [[player, *(by_player.get(player, "–") for by_player in cells.values())] for player in players]
    return DataTable([f"{kind} ({name}, {unit})", *cells], rows, "±: one standard error, for sampled orders.")


def _warnings(runs: Sequence[OpenRun], values_by_kind: dict[str, list[RunValues]], standard_error: float) -> list[str]:
    warnings = [folded_residual_warning(run) for run in runs if run.residual]
    for kind, values in values_by_kind.items():
        for run_values in values:
            if (error := float(run_values.by_metric["accuracy"].errors.max())) > standard_error:
                warnings.append(
                    f"{run_values.run}, {kind}s: the standard error of accuracy is {100 * error:.2g} points, above the "
                    f"requested {100 * standard_error:.2g}; allow more orders with --max-pairs"
                )
    return warnings


def folded_residual_warning(run: OpenRun) -> str:
    """Return the note on a run whose aggregation rule has changed W0."""
    rule = run.config.aggregation.rule
    return f"{run.name}: rule = {rule!r} has changed W0; the change is folded into the adapter, as in the exported one"


def _facts(run_values: RunValues) -> dict[str, Any]:
    players = run_values.players
    facts: dict[str, Any] = {"run": run_values.run, "players": players, "exact": len(players) <= MAX_EXACT}
    for metric, solved in run_values.by_metric.items():
        arrays = {key: value.tolist() for key, value in asdict(solved).items() if key in ("values", "errors")}
        facts[metric if metric == "accuracy" else "minus_loss"] = arrays | {
            "empty": solved.empty,
            "grand": solved.grand,
            "orders": 2 * len(solved.orders),
            "efficiency_error": solved.efficiency_error,
            "top_third": top_third(solved.values),
            "gini": gini(solved.values),
        }
    return facts
