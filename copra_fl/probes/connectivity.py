"""How far adapters are from each other in loss: the line between each pair, and the plane through three of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from copra_fl.adapters.interpolation import Between, combine, interpolate, interpolate_products, walk
from copra_fl.adapters.interpolation import LossPath as Path
from copra_fl.adapters.state import Adapter
from copra_fl.probes import charts
from copra_fl.probes.findings import Findings, origin, setting
from copra_fl.probes.members import Members, Scorer
from copra_fl.probes.open_run import Metrics, Progress, Split
from copra_fl.reporting.html import DataTable, Section
from copra_fl.reporting.tables import Column

Evaluate = Callable[[Sequence[Adapter]], Sequence[Metrics]]
Pair = tuple[int, int]

#: where the plane through three adapters is evaluated along u and v in a + u (b - a) + v (c - a)
LATTICE = tuple(float(u) for u in np.linspace(-0.25, 1.25, 13))
#: of the table of each pair, and of their means
COLUMNS = (
    Column("loss of the ends", "loss_ends", spec=".3f"),
    Column("at u = 0.5", "loss_middle", spec=".3f"),
    Column("barrier (Entezari)", "barrier_entezari", spec="+.3f"),
    Column("barrier (Frankle)", "barrier_frankle", spec="+.3f"),
    Column("accuracy of the ends, %", "accuracy_ends", scale=100),
    Column("midpoint gap, points", "midpoint_gap", scale=100, spec="+.1f"),
)
CAPTION = (
    "Factor path: A and B interpolated apart, as federated averaging does; product path: (1-u) dW_a + u dW_b exactly. "
    "Entezari: highest loss above the straight line between the ends' losses. Frankle: highest loss above the mean of "
    "the ends. Midpoint gap: accuracy at u = 0.5 minus the mean of the ends."
)


@dataclass(frozen=True)
class Plane:
    """Loss and accuracy, each (v, u), of a + u (b - a) + v (c - a) at `LATTICE`."""

    loss: list[list[float]]
    accuracy: list[list[float]]


def lines(
    scorer: Scorer, adapters: Sequence[Adapter], num_points: int, along: Between, done: Callable[[], None]
) -> dict[Pair, Path]:
    """The path between each pair of adapters, evaluated on the data sets of both."""
    found = {}
    for i, j in combinations(range(len(adapters)), 2):
        found[i, j] = walk(scorer((i, j)), adapters[i], adapters[j], num_points, along)
        done()
    return found


def matrix(paths: dict[Pair, Path], number: int, value: Callable[[Path], float]) -> np.ndarray:
    """(number, number) of `value` for each pair: symmetric, as a path has two directions, with a diagonal of zeros."""
    cells = np.zeros((number, number))
    for (i, j), path in paths.items():
        cells[i, j] = cells[j, i] = value(path)
    return cells


def plane(evaluate: Evaluate, corners: Sequence[Adapter], done: Callable[[], None]) -> Plane:
    """The plane through three adapters; a point's barycentric weights are 1 - u - v, u and v."""
    loss, accuracy = [], []
    for v in LATTICE:
        metrics = evaluate([combine(corners, (1 - u - v, u, v)) for u in LATTICE])
        loss.append([each["loss"] for each in metrics])
        accuracy.append([each["accuracy"] for each in metrics])
        done()
    return Plane(loss, accuracy)


def probe(members: Members, split: Split, num_points: int, triangle: bool, progress: Progress) -> Findings:
    """Every pair of the members on both paths and, with `triangle`, the plane through the first three."""
    number = len(members.names)
    num_pairs, paths, warnings = number * (number - 1) // 2, {}, []
    reason, plane_found = members.factors_differ, None
    if reason:
        warnings.append(f"No factor path and no plane: {reason}.")
    else:
        scorer = members.scorer(split)
        paths["factor"] = lines(
            scorer, members.adapters, num_points, interpolate, lambda: progress("factor paths", 1, num_pairs)
        )
    adapters, plain_scorer = members.plain(split)
    paths["product"] = lines(
        plain_scorer, adapters, num_points, interpolate_products, lambda: progress("product paths", 1, num_pairs)
    )
    if triangle and number >= 3 and not reason:
        plane_found = plane(scorer(range(3)), members.adapters[:3], lambda: progress("plane", 1, len(LATTICE)))
    told = setting(members.runs, split, members.what, f"{num_points} points a line")
    return Findings(
        probe="connectivity",
        title=f"Between {members.what}",
        setting=told,
        verdict=_verdict(members, paths),
        results=_results(paths),
        facts=_facts(members, split, paths, plane_found),
        sections=_sections(members, paths, plane_found, told),
        warnings=warnings,
    )


def _numbers(path: Path) -> dict[str, float]:
    middle = float(np.interp(0.5, path.u, path.loss))
    ends = {name: (values[0] + values[-1]) / 2 for name, values in (("loss", path.loss), ("accuracy", path.accuracy))}
    return {
        "loss_ends": ends["loss"],
        "loss_middle": middle,
        "accuracy_ends": ends["accuracy"],
        "barrier_entezari": path.barrier_entezari,
        "barrier_frankle": path.barrier_frankle,
        "midpoint_gap": path.midpoint_gap,
    }


def _means(paths: dict[Pair, Path]) -> dict[str, float]:
    numbers = [_numbers(path) for path in paths.values()]
    return {name: fmean(each[name] for each in numbers) for name in numbers[0]}


def _results(paths: dict[str, dict[Pair, Path]]) -> DataTable:
    rows = []
    for kind, found in paths.items():
        means = _means(found)
        rows.append([kind, str(len(found)), *(column.format(means[column.metric]) for column in COLUMNS)])
    return DataTable(["path", "pairs", *(column.heading for column in COLUMNS)], rows, f"Means over pairs. {CAPTION}")


def _verdict(members: Members, paths: dict[str, dict[Pair, Path]]) -> str:
    said = []
    for kind, found in paths.items():
        worst = max(found, key=lambda pair: found[pair].barrier_entezari)
        gap, barrier = _means(found)["midpoint_gap"], found[worst].barrier_entezari
        where = f", between {members.names[worst[0]]} and {members.names[worst[1]]}" if len(found) > 1 else ""
        hill = f"the {'largest ' if where else ''}barrier is {barrier:.3f}{where}" if barrier else "there is no barrier"
        side = "below" if gap < 0 else "above"
        said.append(f"On the {kind} path {hill}; half way accuracy is {abs(100 * gap):.1f} points {side} the ends'.")
    return " ".join(said)


def _barriers(paths: dict[str, dict[Pair, Path]], number: int) -> dict[str, np.ndarray]:
    return {kind: matrix(found, number, lambda path: path.barrier_entezari) for kind, found in paths.items()}


def _facts(
    members: Members, split: Split, paths: dict[str, dict[Pair, Path]], plane_found: Plane | None
) -> dict[str, Any]:
    names, number = list(members.names), len(members.names)
    return origin(members.runs, split) | {
        "members": {"what": members.what, "names": names},
        "paths": {
            kind: [{"pair": [names[i], names[j]], **path.facts} for (i, j), path in found.items()]
            for kind, found in paths.items()
        },
        "means": {kind: _means(found) for kind, found in paths.items()},
        "barriers_entezari": {kind: cells.tolist() for kind, cells in _barriers(paths, number).items()},
        "plane": plane_found and {"through": names[:3], "lattice": LATTICE, **vars(plane_found)},
    }


def _sections(
    members: Members, paths: dict[str, dict[Pair, Path]], plane_found: Plane | None, told: str
) -> list[Section]:
    names = members.names
    by_pair = {
        kind: {f"{names[i]} – {names[j]}": path for (i, j), path in found.items()} for kind, found in paths.items()
    }
    each = [
        [pair, kind, *(column.format(_numbers(path)[column.metric]) for column in COLUMNS)]
        for kind, found in by_pair.items()
        for pair, path in found.items()
    ]
    sections = [Section("On the lines", charts.along_lines(by_pair, told))]
    if len(names) > 2:
        barriers = {
            kind: matrix(found, len(names), lambda path: path.barrier_entezari) for kind, found in paths.items()
        }
        sections.append(Section("Each pair", charts.barriers(barriers, names, told)))
    if plane_found:
        values = {"loss": plane_found.loss, "accuracy": plane_found.accuracy}
        sections.append(Section("The plane through three", charts.planes(values, LATTICE, names[:3], told)))
    table = DataTable(["pair", "path", *(column.heading for column in COLUMNS)], each, CAPTION)
    return [*sections, Section("Each line", tables=[table], collapsed=True)]
