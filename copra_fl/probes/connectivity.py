"""`copra-fl probe connectivity`: loss on the line between each pair of adapters, and on the plane through three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from copra_fl.adapters.interpolation import Between, LossPath, combine, interpolate, interpolate_products, walk
from copra_fl.adapters.state import Adapter
from copra_fl.probes import charts
from copra_fl.probes.findings import Findings, setting_facts, setting_line
from copra_fl.probes.members import Members
from copra_fl.probes.open_run import Metrics, Progress, Split
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.html import Section
from copra_fl.reporting.tables import Column

#: evaluates adapters together
Evaluate = Callable[[Sequence[Adapter]], Sequence[Metrics]]
#: evaluates combinations of members (indices) together, on the data sets of these members
ScoreMembers = Callable[[Sequence[int], Sequence[Adapter]], Sequence[Metrics]]
#: indices of two members
Pair = tuple[int, int]

#: values of u and v at which the plane a + u (b - a) + v (c - a) is evaluated
LATTICE = tuple(float(u) for u in np.linspace(-0.25, 1.25, 13))
#: columns of the tables of pairs and of means over pairs
COLUMNS = (
    Column("mean loss of the ends", "loss_ends", spec=".3f"),
    Column("loss at u = 0.5", "loss_middle", spec=".3f"),
    Column("barrier (Entezari)", "barrier_entezari", spec="+.3f"),
    Column("barrier (Frankle)", "barrier_frankle", spec="+.3f"),
    Column("mean accuracy of the ends, %", "accuracy_ends", scale=100),
    Column("midpoint gap, points", "midpoint_gap", scale=100, spec="+.1f"),
)
CAPTION = (
    "Factor path: A and B are interpolated separately, as in federated averaging. Product path: (1-u) dW_a + u dW_b, "
    "exactly. Barrier (Entezari): largest excess of the loss over the straight line between the losses of the ends. "
    "Barrier (Frankle): largest excess over the mean loss of the ends. Midpoint gap: accuracy at u = 0.5 minus the "
    "mean accuracy of the ends."
)


@dataclass(frozen=True)
class Plane:
    """Loss and accuracy of a + u (b - a) + v (c - a), as rows of v and columns of u at `LATTICE`."""

    loss: list[list[float]]
    accuracy: list[list[float]]


def lines(
    score: ScoreMembers, adapters: Sequence[Adapter], num_points: int, between: Between, done: Callable[[], None]
) -> dict[Pair, LossPath]:
    """Return the path between each pair of adapters; `done` is called after each."""
    paths = {}
    for i, j in combinations(range(len(adapters)), 2):
        paths[i, j] = walk(partial(score, (i, j)), adapters[i], adapters[j], num_points, between)
        done()
    return paths


def matrix(paths: dict[Pair, LossPath], number: int, value: Callable[[LossPath], float]) -> np.ndarray:
    """Return the symmetric (number, number) matrix of `value` of each pair, with zeros on the diagonal."""
    cells = np.zeros((number, number))
    for (i, j), path in paths.items():
        cells[i, j] = cells[j, i] = value(path)
    return cells


def plane(evaluate: Evaluate, corners: Sequence[Adapter], done: Callable[[], None]) -> Plane:
    """Evaluate the plane through three adapters; a point has the barycentric weights 1 - u - v, u and v."""
    loss, accuracy = [], []
    for v in LATTICE:
        metrics = evaluate([combine(corners, (1 - u - v, u, v)) for u in LATTICE])
        loss.append([point["loss"] for point in metrics])
        accuracy.append([point["accuracy"] for point in metrics])
        done()
    return Plane(loss, accuracy)


def probe(members: Members, split: Split, num_points: int, triangle: bool, progress: Progress) -> Findings:
    """Evaluate both paths between every pair of members and, if `triangle`, the plane through the first three."""
    number = len(members.names)
    num_pairs, paths, warnings = number * (number - 1) // 2, {}, []
    score, score_plain = partial(members.score, split=split), partial(members.score_plain, split=split)
    mismatch, measured_plane = members.factor_mismatch, None
    if mismatch:
        warnings.append(f"The factor paths and the plane are left out: {mismatch}.")
    else:
        paths["factor"] = lines(
            score, members.adapters, num_points, interpolate, lambda: progress("factor paths", 1, num_pairs)
        )
    paths["product"] = lines(
        score_plain,
        members.plain_adapters,
        num_points,
        interpolate_products,
        lambda: progress("product paths", 1, num_pairs),
    )
    if triangle and number >= 3 and not mismatch:
        corners = members.adapters[:3]
        measured_plane = plane(partial(score, range(3)), corners, lambda: progress("plane", 1, len(LATTICE)))
    setting = setting_line(members.runs, split, members.description, f"{num_points} points per line")
    return Findings(
        probe="connectivity",
        title=f"Mode connectivity: {members.description}",
        setting=setting,
        verdict=_verdict(members, paths),
        results=_results(paths),
        facts=_facts(members, split, paths, measured_plane),
        sections=_sections(members, paths, measured_plane, setting),
        warnings=warnings,
    )


def _numbers(path: LossPath) -> dict[str, float]:
    middle = float(np.interp(0.5, path.u, path.loss))
    return {
        "loss_ends": (path.loss[0] + path.loss[-1]) / 2,
        "loss_middle": middle,
        "accuracy_ends": (path.accuracy[0] + path.accuracy[-1]) / 2,
        "barrier_entezari": path.barrier_entezari,
        "barrier_frankle": path.barrier_frankle,
        "midpoint_gap": path.midpoint_gap,
    }


def _means(paths: dict[Pair, LossPath]) -> dict[str, float]:
    numbers = [_numbers(path) for path in paths.values()]
    return {name: fmean(pair[name] for pair in numbers) for name in numbers[0]}


def _results(paths: dict[str, dict[Pair, LossPath]]) -> DataTable:
    rows = []
    for kind, by_pair in paths.items():
        means = _means(by_pair)
        rows.append([kind, str(len(by_pair)), *(column.format(means[column.metric]) for column in COLUMNS)])
    return DataTable(["path", "pairs", *(column.heading for column in COLUMNS)], rows, f"Means over pairs. {CAPTION}")


def _verdict(members: Members, paths: dict[str, dict[Pair, LossPath]]) -> str:
    sentences = []
    for kind, by_pair in paths.items():
        worst = max(by_pair, key=lambda pair: by_pair[pair].barrier_entezari)
        gap, barrier = _means(by_pair)["midpoint_gap"], by_pair[worst].barrier_entezari
        if not barrier:
            height = "there is no barrier"
        elif len(by_pair) > 1:
            pair = f"{members.names[worst[0]]} and {members.names[worst[1]]}"
            height = f"the largest barrier is {barrier:.3f}, between {pair}"
        else:
            height = f"the barrier is {barrier:.3f}"
        side = "below" if gap < 0 else "above"
        sentences.append(
            f"On the {kind} path {height}; accuracy at the midpoint is {abs(100 * gap):.1f} points {side} the mean of "
            "the ends."
        )
    return " ".join(sentences)


def _barriers(paths: dict[str, dict[Pair, LossPath]], number: int) -> dict[str, np.ndarray]:
    return {kind: matrix(by_pair, number, lambda path: path.barrier_entezari) for kind, by_pair in paths.items()}


def _facts(
    members: Members, split: Split, paths: dict[str, dict[Pair, LossPath]], measured_plane: Plane | None
) -> dict[str, Any]:
    names = list(members.names)
    return setting_facts(members.runs, split) | {
        "members": {"description": members.description, "names": names},
        "paths": {
            kind: [{"pair": [names[i], names[j]], **path.facts} for (i, j), path in by_pair.items()]
            for kind, by_pair in paths.items()
        },
        "means": {kind: _means(by_pair) for kind, by_pair in paths.items()},
        "barriers_entezari": {kind: cells.tolist() for kind, cells in _barriers(paths, len(names)).items()},
        "plane": measured_plane and {"through": names[:3], "lattice": LATTICE, **vars(measured_plane)},
    }


def _sections(
    members: Members, paths: dict[str, dict[Pair, LossPath]], measured_plane: Plane | None, setting: str
) -> list[Section]:
    names = members.names
    by_kind = {
        kind: {f"{names[i]} – {names[j]}": path for (i, j), path in by_pair.items()} for kind, by_pair in paths.items()
    }
    rows = [
        [pair, kind, *(column.format(_numbers(path)[column.metric]) for column in COLUMNS)]
        for kind, by_pair in by_kind.items()
        for pair, path in by_pair.items()
    ]
    sections = [Section("Lines", charts.along_lines(by_kind, setting))]
    if len(names) > 2:
        sections.append(Section("Barriers of all pairs", charts.barriers(_barriers(paths, len(names)), names, setting)))
    if measured_plane:
        values = {"loss": measured_plane.loss, "accuracy": measured_plane.accuracy}
        sections.append(Section("The plane through three adapters", charts.planes(values, LATTICE, names[:3], setting)))
    table = DataTable(["pair", "path", *(column.heading for column in COLUMNS)], rows, CAPTION)
    return [*sections, Section("Numbers of all lines", tables=[table], collapsed=True)]
