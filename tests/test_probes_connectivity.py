"""Lines and planes: numbers by hand for a toy loss, real models against their own scores, the command on real runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from copra_fl.adapters.interpolation import combine, interpolate, interpolate_products, walk
from copra_fl.adapters.state import Adapter, parts
from copra_fl.cli import app
from copra_fl.probes.connectivity import LATTICE, lines, matrix, plane, probe
from copra_fl.probes.members import select_members
from copra_fl.probes.open_run import OpenRun, no_progress, open_run, plain_adapters
from tests.support.browser import check_page, needs_chromium
from tests.support.command_line import run_command
from tests.support.federations import finished_run
from tests.support.tiny import Settings


def bowl(adapters: Sequence[Adapter]) -> list[dict[str, float]]:
    """loss = 1 - dW^2 for dW = B A with one entry: high where the product is small."""
    products = [float(a["m.lora_B.weight"] @ a["m.lora_A.weight"]) for a in adapters]
    return [{"loss": 1 - product**2, "accuracy": abs(product)} for product in products]


def rank_1(b: float, a: float, head: float = 0.0) -> Adapter:
    b, a, head = (torch.tensor([[value]], dtype=torch.float64) for value in (b, a, head))
    return {"m.lora_A.weight": a, "m.lora_B.weight": b, "head.weight": head}


def test_paths_between_equal_products_by_hand() -> None:
    """B A = 1 1 and -1 -1 have the product 1; at the midpoint the factors are 0, but the product path stays at 1."""
    a, b = rank_1(1, 1), rank_1(-1, -1)
    factor, product = (walk(bowl, a, b, 21, along) for along in (interpolate, interpolate_products))
    assert factor.barrier_entezari == factor.barrier_frankle == pytest.approx(1.0)
    assert factor.midpoint_gap == pytest.approx(-1.0)
    assert product.barrier_entezari == pytest.approx(0.0) and product.midpoint_gap == pytest.approx(0.0)
    assert factor.loss[5] == pytest.approx(1 - 0.5**4), "factors 1/2, product 1/4"


def test_barrier_of_a_quadratic_by_hand() -> None:
    """Products 1 and -1: dW = 1 - 2u on the product path, loss 1 - (1 - 2u)^2, barrier 1 at u = 1/2."""
    path = walk(bowl, rank_1(1, 1), rank_1(1, -1), 21, interpolate_products)
    assert path.barrier_entezari == pytest.approx(1.0)
    assert path.loss == pytest.approx([1 - (1 - 2 * u) ** 2 for u in path.u])


def test_ends_of_lines_and_corners_of_planes_are_exact() -> None:
    a, b, c = (rank_1(*torch.randn(3, generator=torch.Generator().manual_seed(i)).tolist()) for i in range(3))
    for end, u in ((a, 0.0), (b, 1.0)):
        point = interpolate_products(a, b, u)
        assert torch.equal(point["m.lora_B.weight"] @ point["m.lora_A.weight"],
                           end["m.lora_B.weight"] @ end["m.lora_A.weight"])  # fmt: skip
        assert torch.equal(point["head.weight"], end["head.weight"])
    for corner, weights in ((a, (1.0, 0.0, 0.0)), (b, (0.0, 1.0, 0.0)), (c, (0.0, 0.0, 1.0))):
        assert all(torch.equal(combine([a, b, c], weights)[name], corner[name]) for name in corner)
    middle = combine([a, b, c], (1 / 3, 1 / 3, 1 / 3))["head.weight"]
    assert float(middle) == pytest.approx(float(a["head.weight"] + b["head.weight"] + c["head.weight"]) / 3)
    measured, losses = plane(bowl, [a, b, c], lambda: None), [metrics["loss"] for metrics in bowl([a, b, c])]
    zero, one = LATTICE.index(0.0), LATTICE.index(1.0)
    assert [measured.loss[zero][zero], measured.loss[zero][one], measured.loss[one][zero]] == losses


def test_matrix_is_symmetric_with_zeros_on_the_diagonal() -> None:
    adapters, calls = [rank_1(1, 1), rank_1(-1, -1), rank_1(1, 1)], []
    paths = lines(lambda pair, points: bowl(points), adapters, 5, interpolate, lambda: calls.append(1))
    cells = matrix(paths, 3, lambda path: path.barrier_entezari)
    assert np.array_equal(cells, cells.T) and not cells.diagonal().any() and len(calls) == 3
    assert cells == pytest.approx(np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))


@pytest.fixture(scope="module")
def run(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    directory = tmp_path_factory.mktemp("runs") / "run"
    return open_run(finished_run(tiny | {"num-clients": 3, "learning-rate": 0.05, "local-training": "lora"}, directory))


def test_product_path_of_a_real_model_starts_and_ends_at_its_adapters(run: OpenRun) -> None:
    (plain_a, plain_b), _ = plain_adapters([run.state(2), run.state(1)], [run.scaling] * 2)
    path = walk(run.score_plain, plain_a, plain_b, 3, interpolate_products)
    ends = run.score([run.state(2).adapter, run.state(1).adapter])
    assert path.loss[0] == pytest.approx(ends[0]["loss"], rel=1e-5)
    assert path.loss[2] == pytest.approx(ends[1]["loss"], rel=1e-5)
    assert path.loss[0] != pytest.approx(path.loss[2], rel=1e-3), "the ends are different models"


def test_command_compares_clients_of_a_round(run: OpenRun, tmp_path: Path) -> None:
    arguments = ["probe", "connectivity", str(run.directory), "--points", "3", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    json_path, page_path = (tmp_path / f"probe-connectivity.{kind}" for kind in ("json", "html"))
    facts = json.loads(json_path.read_text())
    assert facts["split"] == "server-validation" and facts["examples"] == len(run.data.server_validation)
    assert facts["runs"][0]["seed"] == 0 and facts["members"]["names"] == ["client 0", "client 1", "client 2"]
    ends = run.score(list(run.clients(2).values()), residual=run.state(1).residual)
    for kind in ("factor", "product"):
        assert [path["pair"] for path in facts["paths"][kind]] == [
            ["client 0", "client 1"], ["client 0", "client 2"], ["client 1", "client 2"]
        ]  # fmt: skip
        assert facts["paths"][kind][0]["loss"][::2] == pytest.approx([ends[0]["loss"], ends[1]["loss"]], rel=1e-5)
    corner = facts["plane"]["loss"][LATTICE.index(0.0)][LATTICE.index(0.0)]
    assert corner == pytest.approx(ends[0]["loss"], rel=1e-5)
    page = page_path.read_text()
    assert "Barriers, product path" in page and "on the plane through three" in page and "(seed 0)" in page


def test_command_compares_rounds_and_runs(run: OpenRun, tiny: Settings, tmp_path: Path) -> None:
    other_run = finished_run(tiny | {"seed": 1, "rank": 3, "num-rounds": 1, "num-clients": 3}, tmp_path / "other")
    options = ["--points", "3", "--output", str(tmp_path / "page")]
    for selected, names in (
        ([str(run.directory), "--rounds", "0,2"], ["round 0", "round 2"]),
        ([str(run.directory), str(other_run)], ["run", "other"]),
    ):
        result = CliRunner().invoke(app, ["probe", "connectivity", *selected, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        facts = json.loads((tmp_path / "page" / "probe-connectivity.json").read_text())
        assert facts["members"]["names"] == names and len(facts["paths"]["product"]) == 1
    assert "factor" not in facts["paths"] and "unequal ranks" in facts["warnings"][0]


def test_two_federations_of_other_seeds_are_compared_on_both_paths(
    run: OpenRun, tiny: Settings, tmp_path: Path
) -> None:
    """They have different initial A; the ends of both lines are the runs' own models on the same held-out data."""
    flat = tiny | {"seed": 1, "num-clients": 3, "num-rounds": 1, "local-training": "lora"}
    other = open_run(finished_run(flat, tmp_path / "other"))
    initial = [opened.state(0).adapter for opened in (run, other)]
    assert all(not torch.equal(initial[0][name], initial[1][name]) for name in parts(initial[0], "A"))
    members = select_members([run, other], no_progress)
    assert members.weights == [0.5, 0.5]
    facts = probe(members, "test", 3, triangle=False, progress=no_progress).facts
    ends = [opened.score([opened.adapter], "test")[0]["loss"] for opened in (run, other)]
    for kind in ("factor", "product"):
        assert facts["paths"][kind][0]["loss"][::2] == pytest.approx(ends, rel=1e-4)
    middles = [facts["paths"][kind][0]["loss"][1] for kind in ("factor", "product")]
    assert middles[0] != pytest.approx(middles[1], rel=1e-4), "averaging factors is not averaging products"


@pytest.mark.parametrize(("rule", "kinds"), [("flora", {"product"}), ("fed-sb", {"factor", "product"})])
def test_product_paths_for_rules_that_change_w0_or_have_a_core(
    tiny: Settings, rule: str, kinds: set[str], tmp_path: Path
) -> None:
    """FLoRA changes W0 in each round, so factors of two rounds cannot be averaged; Fed-SB's B and A never change."""
    flat = tiny | {"rule": rule, "local-training": "lora", "learning-rate": 0.05}
    directory = finished_run(flat, tmp_path / "run")
    arguments = ["probe", "connectivity", str(directory), "--rounds", "1,2", "--points", "3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    paths = json.loads((directory / "probe-connectivity.json").read_text())["paths"]
    assert paths.keys() == kinds
    run = open_run(directory)
    for number, end in ((1, 0), (2, -1)):
        state = run.state(number)
        (metrics,) = run.score([state.adapter], residual=state.residual)
        for (path,) in paths.values():
            assert path["loss"][end] == pytest.approx(metrics["loss"], rel=1e-4)


@needs_chromium
def test_page_opens_in_a_browser(run: OpenRun, tmp_path: Path) -> None:
    """Two figures of lines, two heat maps, two of the plane."""
    arguments = ["probe", "connectivity", str(run.directory), "--points", "3", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    check_page(tmp_path / "probe-connectivity.html", num_figures=6)


def test_contradicting_or_absent_members_are_refused(run: OpenRun) -> None:
    for arguments, message in (
        (["--clients", "0,9"], "clients 9 did not train in round 2; choose from 0, 1 and 2"),
        (["--clients", "1"], "at least two adapters; clients 1 of round 2 (of 3) is only one"),
        (["--rounds", "1,2", "--round", "1"], "use only one"),
        (["--rounds", "1,7"], "has no round 7"),
        (["--round", "7"], "has no round 7"),
    ):
        output = run_command("probe", "connectivity", run.directory, *arguments, code=2)
        assert message in output.message
