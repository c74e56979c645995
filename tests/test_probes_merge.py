"""Merging: PEFT's results against sums by hand, product paths against PEFT's cat, the command on a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from copra_fl.adapters.interpolation import interpolate_products
from copra_fl.adapters.state import Adapter
from copra_fl.cli import app
from copra_fl.probes.merging import MERGE_METHODS, MergeMethod, merge
from copra_fl.probes.open_run import open_run
from copra_fl.reporting import report
from tests.support.federations import finished_run
from tests.support.run_folders import num_figures
from tests.support.tiny import Settings

A, B = "base_model.model.layer.0.query.lora_A.weight", "base_model.model.layer.0.query.lora_B.weight"


def adapter(seed: int, rank: int = 2) -> Adapter:
    stream = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, 5), B: (4, rank), "head.weight": (3, 4), "head.bias": (3,)}
    return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}


def product(adapter: Adapter) -> torch.Tensor:
    return adapter[B] @ adapter[A]


def merged(name: str, adapters: list[Adapter], shares: list[float], density: float = 0.5, seed: int = 0) -> Adapter:
    return merge(adapters, MERGE_METHODS[name], shares, scale=0.4, density=density, seed=seed)


def test_averages_and_task_arithmetic_by_hand() -> None:
    adapters, shares = [adapter(0), adapter(1), adapter(2)], [0.5, 0.3, 0.2]
    factors = merged("average of factors", adapters, shares)
    for name in (A, B, "head.weight", "head.bias"):
        mean = sum(share * member[name] for share, member in zip(shares, adapters, strict=True))
        assert torch.allclose(factors[name], mean, atol=1e-6), name
    exact = sum(share * product(member) for share, member in zip(shares, adapters, strict=True))
    assert torch.allclose(product(merged("average of products", adapters, shares)), exact, atol=1e-6)
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    best = u[:, :2] * s[:2] @ v[:2]
    assert torch.allclose(product(merged("average of products, best rank r", adapters, shares)), best, atol=1e-5)
    total = 0.4 * sum(map(product, adapters))
    assert torch.allclose(product(merged("task arithmetic", adapters, shares)), total, atol=1e-6)


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_product_path_equals_pefts_cat(u: float) -> None:
    a, b = adapter(0), adapter(1, rank=3)
    by_peft = merge([a, b], MergeMethod("cat", "share"), [1 - u, u], scale=1, density=1, seed=0)
    ours = interpolate_products(a, b, u)
    assert torch.allclose(product(ours), product(by_peft), atol=1e-6)
    assert torch.allclose(ours["head.weight"], by_peft["head.weight"], atol=1e-6)


def test_ties_keeps_the_majority_sign_and_dare_depends_on_its_seed() -> None:
    """Products 2 and -1 in one entry: the sign with more mass wins, and the other product does not count."""
    positive, negative = (
        {A: torch.tensor([[1.0]]), B: torch.tensor([[value]]), "head.weight": torch.ones(1)} for value in (2.0, -1.0)
    )
    by_ties = merged("TIES of products", [positive, negative], [0.5, 0.5], density=1)
    assert product(by_ties) == pytest.approx(2.0, rel=1e-6)
    adapters = [adapter(0), adapter(1)]
    draws = [product(merged("DARE of products", adapters, [0.5, 0.5], seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_command_merges_clients_and_runs(tiny: Settings, tmp_path: Path) -> None:
    flat = tiny | {"num-clients": 3, "local-training": "lora", "rule": "fedavg"}
    run = finished_run(flat, tmp_path / "run")
    result = CliRunner().invoke(app, ["probe", "merge", str(run), "--split", "test"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts = json.loads((run / "probe-merge.json").read_text())
    assert [row["name"] for row in facts["before"]] == ["client 0", "client 1", "client 2"]
    assert [row["name"] for row in facts["merged"]] == list(MERGE_METHODS)
    opened = open_run(run)
    (federated,) = opened.score([opened.adapter], "test")
    assert facts["merged"][0]["loss"] == pytest.approx(federated["loss"], rel=1e-5), "FedAvg of the round"
    n, z = len(opened.indices("test")), 1.959964
    share = federated["accuracy"]
    center, spread = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    wilson = [(center - spread) / (1 + z**2 / n), (center + spread) / (1 + z**2 / n)]
    assert facts["merged"][0]["interval"] == pytest.approx(wilson, rel=1e-6)
    report.write(run)
    assert "<h2>Merging " in (run / "report.html").read_text()
    shown = num_figures(run)
    (run / "probe-merge.figures.json").unlink()
    assert shown == num_figures(run) + 1
    assert "DARE: seed 0" in (run / "probe-merge.html").read_text()
    other_run = finished_run(flat | {"seed": 1, "rank": 3}, tmp_path / "other")
    result = CliRunner().invoke(app, ["probe", "merge", str(run), str(other_run)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts = json.loads((run / "probe-merge.json").read_text())
    assert [row["rank"] for row in facts["before"]] == [2, 3] and "unequal ranks" in facts["warnings"][0]
    assert {row["kind"]: row["rank"] for row in facts["merged"]}["cat"] == 5
    assert "linear" not in {row["kind"] for row in facts["merged"]}


def test_an_accuracy_over_tokens_has_no_interval(tiny: Settings, tiny_llama: str, tmp_path: Path) -> None:
    language_model = {"task": "causal-lm", "model": tiny_llama, "target-modules": "q_proj,v_proj", "partitioner": "iid"}
    run = finished_run(tiny | language_model | {"num-clients": 2, "local-training": "lora"}, tmp_path / "run")
    result = CliRunner().invoke(app, ["probe", "merge", str(run), "--split", "test"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts = json.loads((run / "probe-merge.json").read_text())
    assert not any("interval" in row for row in (*facts["before"], *facts["merged"]))
    assert "interval" not in result.output
