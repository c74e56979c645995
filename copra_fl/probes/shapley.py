"""`copra-fl probe shapley`: how evenly a run's accuracy is spread over its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from copra_fl.adapters.state import Adapter
from copra_fl.copra.gates import group_name
from copra_fl.probes import pruned_adapters
from copra_fl.probes.exported import METRICS, Game, solve, wholes
from copra_fl.probes.findings import Findings, origin, setting
from copra_fl.probes.open_run import OpenRun, Progress, Split
from copra_fl.probes.shapley_values import MAX_EXACT, Shapley, gini, top_third
from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import HEIGHT, DataTable, Figure, Section, empty_chart
from copra_fl.wording import join_words

#: metric -> how it is called, its unit, and what it is multiplied by to be shown
SHOWN = {"accuracy": ("accuracy", "points", 100.0), "loss": ("minus loss", "nats", 1.0)}


@dataclass(frozen=True)
class Worth:
    """The Shapley values of a run's `players` (``layer`` or ``module``), by metric."""

    run: str
    players: list[str]
    by_metric: dict[str, Shapley]


def probe(
    runs: Sequence[OpenRun],
    split: Split,
    modules: bool,
    standard_error: float,
    max_pairs: int,
    seed: int,
    progress: Progress,
) -> Findings:
    """Shapley values of each run's layers, and where `modules` is wanted of its single modules too."""
    kinds = {"layer": pruned_adapters.layers, **({"module": _single} if modules else {})}
    found: dict[str, list[Worth]] = {}
    for kind, players_of in kinds.items():
        for whole in wholes(runs):
            players = players_of(whole.adapter)
            game = Game(whole, list(players.values()), split, progress)
            found.setdefault(kind, []).append(
                Worth(whole.run.name, [short(name) for name in players], solve(game, standard_error, max_pairs, seed))
            )
    how = {kind: _how(worths, seed) for kind, worths in found.items()}
    sections = [section for kind, worths in found.items() for section in _sections(kind, worths, how[kind])]
    facts = {"seed": seed, "wanted_standard_error": standard_error} | {
        f"{kind}s": [_facts(worth) for worth in worths] for kind, worths in found.items()
    }
    return Findings(
        probe="shapley",
        title=f"What each layer is worth: {join_words(run.name for run in runs)}",
        setting=setting(runs, split, *dict.fromkeys(f"{kind}s: {text}" for kind, text in how.items())),
        verdict=_verdict(found["layer"]),
        results=_results(found),
        facts=origin(runs, split) | facts,
        sections=sections,
        warnings=list(_warnings(runs, found, standard_error)),
    )


def short(module: str) -> str:
    """The name of a layer or module without PEFT's prefix."""
    return module.removeprefix("base_model.model.")


def _single(adapter: Adapter) -> dict[str, list[str]]:
    return {module: [module] for module in pruned_adapters.modules(adapter)}


def _how(worths: Sequence[Worth], seed: int) -> str:
    counts = dict.fromkeys(
        f"{2 * len(worth.by_metric['accuracy'].orders)} orders, seed {seed}"
        if len(worth.by_metric["accuracy"].orders)
        else f"all {2 ** len(worth.players)} coalitions"
        for worth in worths
    )
    return join_words(counts)


def _verdict(worths: Sequence[Worth]) -> str:
    first = worths[0].by_metric["accuracy"].values
    even = -(-len(first) // 3) / len(first)
    shares = [f"{worth.run} {top_third(worth.by_metric['accuracy'].values):.0%}" for worth in worths]
    return (
        f"Share of accuracy's Shapley mass in the top third of layers: {join_words(shares)}; "
        f"spread evenly it is {even:.0%}."
    )


def _results(found: dict[str, list[Worth]]) -> DataTable:
    header = ["run", "players", "metric", "none", "all", "top 1/3, %", "Gini"]
    rows = []
    for kind, worths in found.items():
        for metric, (name, _, scale) in SHOWN.items():
            for worth in worths:
                solved = worth.by_metric[metric]
                rows.append([
                    worth.run,
                    f"{len(worth.players)} {kind}s",
                    f"{name}{', %' if scale > 1 else ''}",
                    f"{scale * solved.nothing:.3g}",
                    f"{scale * solved.everything:.3g}",
                    f"{100 * top_third(solved.values):.1f}",
                    f"{gini(solved.values):.2f}",
                ])  # fmt: skip
    caption = (
        "None, all: with no adapter on, with all; the head always is. Top 1/3: the share of these players in the mass, "
        "which is the sum of absolute Shapley values. Gini: 0 where all are worth the same, near 1 where one is worth "
        "all. The noise of sampled values makes both a little too high."
    )
    return DataTable(header, rows, caption)


def _sections(kind: str, worths: Sequence[Worth], how: str) -> list[Section]:
    bars = [_bars(kind, worths, metric, how) for metric in METRICS]
    maps = [each for metric in METRICS for each in _heat_maps(worths, metric, how)] if kind == "module" else []
    return [
        Section(f"What each {kind} is worth", [*bars, *maps]),
        Section(f"Shapley values of {kind}s", tables=[_values(kind, worths, metric) for metric in METRICS],
                collapsed=True),
    ]  # fmt: skip


def _bars(kind: str, worths: Sequence[Worth], metric: str, how: str) -> Figure:
    name, unit, scale = SHOWN[metric]
    chart = empty_chart({"title": f"{name}, {unit}"}, {"type": "category"})
    chart.update_layout(height=max(HEIGHT, 100 + len(worths[0].players) * (12 + 14 * len(worths))))
    looks = styles(worth.run for worth in worths)
    for worth in worths:
        solved = worth.by_metric[metric]
        chart.add_bar(
            orientation="h",
            x=scale * solved.values,
            y=worth.players,
            name=worth.run,
            marker={"color": looks[worth.run].color},
            error_x={"type": "data", "array": scale * solved.errors, "visible": bool(solved.errors.any())},
            hovertemplate=f"%{{y}}: %{{x:.3g}} {unit}",
        )
    caption = (
        f"Shapley value: what having the {kind}'s adapter on adds to {name}, mean over all orders of switching on "
        f"({how}). All values together are {name} with every adapter on minus {name} of the head alone. "
        "Error bars: standard errors of the sampling of orders, if any; not of the held-out examples."
    )
    return Figure(f"Shapley values, {name}", caption, chart)


def _heat_maps(worths: Sequence[Worth], metric: str, how: str) -> list[Figure]:
    """Layer by module, a map a run, all in the same colours."""
    name, unit, scale = SHOWN[metric]
    largest = scale * max(float(np.abs(worth.by_metric[metric].values).max()) for worth in worths)
    caption = f"Shapley value of each module in {name}, {unit}; layers from below ({how}). All maps have one scale."
    maps = []
    for worth in worths:
        values = dict(zip(worth.players, scale * worth.by_metric[metric].values, strict=True))
        layers = list(dict.fromkeys(group_name(player, "layer") for player in values))
        kinds = list(dict.fromkeys(pruned_adapters.kind(player) for player in values))
        cells = {
            (group_name(player, "layer"), pruned_adapters.kind(player)): float(value)
            for player, value in values.items()
        }
        chart = empty_chart({"type": "category"}, {"type": "category"})
        heat = go.Heatmap(
            x=kinds,
            y=layers,
            z=[[cells.get((layer, kind)) for kind in kinds] for layer in layers],
            zmin=-largest,
            zmax=largest,
            colorscale="RdBu",
            colorbar={"title": {"text": unit}},
            hovertemplate=f"%{{y}}, %{{x}}: %{{z:.3g}} {unit}<extra></extra>",
        )
        chart.add_trace(heat)
        maps.append(Figure(f"Layers and modules of {worth.run}, {name}", caption, chart))
    return maps


def _values(kind: str, worths: Sequence[Worth], metric: str) -> DataTable:
    name, unit, scale = SHOWN[metric]
    cells = {
        worth.run: {
            player: f"{scale * value:+.3f}" + (f" ± {scale * error:.3f}" if error else "")
            for player, value, error in zip(worth.players, solved.values, solved.errors, strict=True)
        }
        for worth in worths
        if (solved := worth.by_metric[metric])
    }
    players = dict.fromkeys(player for worth in worths for player in worth.players)
    rows = [[player, *(by_player.get(player, "–") for by_player in cells.values())] for player in players]
    return DataTable([f"{kind} ({name}, {unit})", *cells], rows, "±: one standard error, where orders were sampled.")


def _warnings(runs: Sequence[OpenRun], found: dict[str, list[Worth]], standard_error: float) -> list[str]:
    warnings = [folded(run) for run in runs if run.residual]
    for kind, worths in found.items():
        for worth in worths:
            if (error := float(worth.by_metric["accuracy"].errors.max())) > standard_error:
                warnings.append(
                    f"{worth.run}, {kind}s: the standard error of accuracy is {100 * error:.2g} points, more than the "
                    f"{100 * standard_error:.2g} wanted; --max-pairs allows more orders"
                )
    return warnings


def folded(run: OpenRun) -> str:
    """What to know where aggregation has changed W0."""
    rule = run.config.aggregation.rule
    return f"{run.name}: rule = {rule!r} has changed W0 beside the adapter; it is taken as the one adapter it exports"


def _facts(worth: Worth) -> dict[str, Any]:
    facts: dict[str, Any] = {"run": worth.run, "players": worth.players, "exact": len(worth.players) <= MAX_EXACT}
    for metric, solved in worth.by_metric.items():
        plain = {key: value.tolist() for key, value in asdict(solved).items() if key in ("values", "errors")}
        facts[metric if metric == "accuracy" else "minus_loss"] = plain | {
            "nothing": solved.nothing,
            "everything": solved.everything,
            "orders": 2 * len(solved.orders),
            "efficiency_error": solved.efficiency_error,
            "top_third": top_third(solved.values),
            "gini": gini(solved.values),
        }
    return facts
