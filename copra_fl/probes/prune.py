"""`copra-fl probe prune`: score a run's adapter after pruning layers, modules, the rank or small values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from copra_fl.probes import pruned_adapters
from copra_fl.probes.charts import UNITS
from copra_fl.probes.elastic import Mean, SubsetScores, layer_score, rank_score, score_subsets
from copra_fl.probes.exported import METRICS, Game, export_runs, solve
from copra_fl.probes.findings import Findings, setting_facts, setting_line
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split, rank_of
from copra_fl.probes.pruned_adapters import Pruned
from copra_fl.probes.shapley import folded_residual_warning
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import HEIGHT, Figure, Section, empty_chart
from copra_fl.wording import join_words


@dataclass(frozen=True)
class Scored:
    """The scores of one run's adapter.

    Attributes:
        rank: of the adapter.
        prunings: each pruned adapter with its metrics.
        subsets: random subsets of the layers, by size, the whole adapter first.
    """

    rank: int
    prunings: list[tuple[Pruned, Metrics]]
    subsets: list[SubsetScores]

    def layer_score(self, metric: str) -> Mean:
        """Return the elastic score over subsets of the layers."""
        return layer_score(self.subsets, metric)

    def rank_score(self, family: str, metric: str) -> float:
        """Return the elastic score over prefixes of the rank; `family` is one of `PREFIXES`."""
        by_size = {
            round(pruned.kept * self.rank): metrics[metric]
            for pruned, metrics in self.prunings
            if pruned.family in (family, "ends")
        }
        return rank_score(by_size, self.rank)


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
    "rank as stored": (
        "Prefixes of the rank, as stored",
        "The first components of each module are kept, in the order of the trained factors' rows and columns.",
    ),
    "rank in SVD order": (
        "Prefixes of the rank, SVD order",
        "The components of largest singular value of each module's B A are kept.",
    ),
}
#: families of prunings by prefixes of the rank
PREFIXES = ("rank as stored", "rank in SVD order")
#: families of prunings that are shown as bars
BARS = ("ends", "layers", "module")


def probe(
    runs: Sequence[OpenRun],
    split: Split,
    standard_error: float,
    max_pairs: int,
    max_subsets: int,
    seed: int,
    progress: Progress,
) -> Findings:
    """Score each run's adapter on held-out data after every kind of pruning.

    The order of layers by Shapley value always comes from the server's validation data. With ``test`` it is not chosen
    on the data of `split`; with ``server-validation`` it is, and a warning says so.
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
            *pruned_adapters.rank_prefixes(exported.adapter),
        ]
        metrics = exported.score([pruned.adapter for pruned in prunings], split, "prunings", progress)
        elastic_game = game if split == game.split else Game(exported, list(layers.values()), split, progress)
        subsets = score_subsets(elastic_game, METRICS, max_subsets, seed)
        scored = Scored(rank_of(exported.adapter), list(zip(prunings, metrics, strict=True)), subsets)
        scored_by_run[exported.run.name] = scored
    warnings = [folded_residual_warning(run) for run in runs if run.residual]
    if split == "server-validation":
        warnings.append(
            "Layers in Shapley order are scored on the examples that chose the order, which flatters it; use --split "
            "test for others."
        )
    order = "layers ordered by Shapley values of minus loss on server-validation"
    return Findings(
        probe="prune",
        title=f"Pruning {join_words(scored_by_run)}",
        setting=setting_line(runs, split, order, f"up to {max_subsets} subsets of layers", f"seed {seed}"),
        verdict=_verdict(scored_by_run),
        results=_table(scored_by_run, "accuracy"),
        facts=setting_facts(runs, split)
        | {"seed": seed, "max_subsets": max_subsets}
        | {"prunings": [_facts(run, scored) for run, scored in scored_by_run.items()]},
        sections=[
            Section("Random subsets of layers", [_subset_curve(scored_by_run, metric) for metric in METRICS]),
            Section(
                "Pruning curves", [_curve(scored_by_run, family, metric) for metric in METRICS for family in CURVES]
            ),
            Section("Sets of layers, and single modules", [_bars(scored_by_run, metric) for metric in METRICS]),
            Section("Losses", tables=[_table(scored_by_run, "loss")], collapsed=True),
        ],
        warnings=warnings,
    )


def _verdict(scored_by_run: dict[str, Scored]) -> str:
    def change(run: str, name: str) -> str:
        accuracies = {pruned.name: 100 * metrics["accuracy"] for pruned, metrics in scored_by_run[run].prunings}
        return f"{run} from {accuracies['whole adapter']:.1f} to {accuracies[name]:.1f}"

    every_other = join_words(change(run, "every other layer") for run in scored_by_run)
    half = join_words(change(run, "largest 50 %") for run in scored_by_run)
    elastic = join_words(
        f"{run} {_cell(scored.layer_score('accuracy'), 'accuracy')}" for run, scored in scored_by_run.items()
    )
    return (
        f"Accuracy in % with every other layer kept: {every_other}; with the larger half of the values kept: {half}. "
        f"Elastic score, the mean with 1, 3/4, 1/2 and 1/4 of the layers: {elastic}."
    )


def _cell(value: float | Mean, metric: str) -> str:
    """Return a value in the unit shown; a mean as ``45.1 ± 0.3``, without the interval if it has no width."""
    _, scale = UNITS[metric]
    spec = f".{1 if metric == 'accuracy' else 3}f"
    if not isinstance(value, Mean):
        return f"{scale * value:{spec}}"
    interval = f" ± {scale * value.half_width:{spec}}" if value.half_width else ""
    return f"{scale * value.value:{spec}}{interval}"


def _table(scored_by_run: dict[str, Scored], metric: str) -> DataTable:
    """Return one row per pruning, with one column per run."""
    unit, _ = UNITS[metric]
    rows: dict[str, list[str]] = {}
    for column, scored in enumerate(scored_by_run.values()):
        for name, kept, value in _named_values(scored, metric):
            row = rows.setdefault(name, [kept, *["–"] * len(scored_by_run)])
            row[1 + column] = _cell(value, metric)
    caption = (
        f"Cells: {unit}. Kept, %: share of the values of A and B that are kept; the head is always kept. Subsets of "
        "layers: mean over all of them, or over random ones ± the half-width of the 95 % interval. Elastic score: mean "
        "with 1, 3/4, 1/2 and 1/4 of the layers or of the rank."
    )
    cells = [[name, *row] for name, row in rows.items()]
    return DataTable([f"kept ({unit})", "kept, %", *scored_by_run], cells, caption)


def _named_values(scored: Scored, metric: str) -> Iterator[tuple[str, str, float | Mean]]:
    """Yield name, share kept in % and value of each row of a run."""
    for pruned, metrics in scored.prunings:
        yield pruned.name, f"{100 * pruned.kept:.0f}", metrics[metric]
    for score in scored.subsets[1:]:
        name = f"{score.size} of {score.num_layers} layers, mean of {score.num_subsets} subsets"
        yield name, f"{100 * score.size / score.num_layers:.0f}", score.mean(metric)
    yield "elastic score, layers", "–", scored.layer_score(metric)
    for family in PREFIXES:
        yield f"elastic score, {family}", "–", scored.rank_score(family, metric)


def _subset_curve(scored_by_run: dict[str, Scored], metric: str) -> Figure:
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": "kept, % of layers", "range": [-3, 103]}, {"title": unit})
    run_styles = styles(scored_by_run)
    for run, scored in scored_by_run.items():
        means = [score.mean(metric) for score in scored.subsets]
        chart.add_scatter(
            x=[100 * score.size / score.num_layers for score in scored.subsets],
            y=[scale * mean.value for mean in means],
            error_y={"array": [scale * mean.half_width for mean in means]},
            text=[f"{score.num_subsets} subsets of {score.size} layers" for score in scored.subsets],
            name=run,
            mode="lines+markers",
            line={"color": run_styles[run].color, "dash": run_styles[run].dash},
            marker={"symbol": run_styles[run].symbol, "size": 8},
            hovertemplate="%{text}: %{y:.3g}",
        )
    caption = (
        "Mean over subsets of the layers of one size: all subsets if they are few, else random ones, the same for all "
        "runs. Bars: 95 % interval over subsets; it does not cover the seed of the run."
    )
    return Figure(f"Random subsets of layers, {metric}", caption, chart)


def _curve(scored_by_run: dict[str, Scored], family: str, metric: str) -> Figure:
    title, family_caption = CURVES[family]
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": "kept, % of values", "range": [-3, 103]}, {"title": unit})
    run_styles = styles(scored_by_run)
    for run, scored in scored_by_run.items():
        points = sorted(
            (100 * pruned.kept, scale * metrics[metric], pruned.name)
            for pruned, metrics in scored.prunings
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
        shown = [(pruned, metrics) for pruned, metrics in scored.prunings if pruned.family in BARS]
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
            {"family": pruned.family, "name": pruned.name, "kept": pruned.kept} | metrics
            for pruned, metrics in scored.prunings
        ],
        "subsets": [
            {"layers": score.size, "of": score.num_layers, "possible": score.num_possible}
            | {metric: score.metrics[metric] for metric in METRICS}
            | {f"{metric}_mean": vars(score.mean(metric)) for metric in METRICS}
            for score in scored.subsets
        ],
        "elastic": {
            metric: {"layers": vars(scored.layer_score(metric))}
            | {family: scored.rank_score(family, metric) for family in PREFIXES}
            for metric in METRICS
        },
    }
