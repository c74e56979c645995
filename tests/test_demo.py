"""The main job, whole: what `make demo` does."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from copra_fl.simulation.recipes import Recipe
from experiments.findings import studies
from tests.support.browser import check_page, needs_chromium
from tests.support.real_runs import RealRun
from tests.support.run_folders import num_figures

ROOT = Path(__file__).parent.parent
METHODS = ["lora", "copra", "kept-moments"]


def test_the_demo_uses_the_learning_rates_that_its_study_has_chosen() -> None:
    recipe = Recipe.read("demo", [])
    (cell,) = studies()["demo-demo"][1].cells
    assert [method for method in cell.methods if method in METHODS] == METHODS
    for method, rate in cell.rates.items():
        assert recipe.config(method).training.learning_rate == rate.chosen


@pytest.mark.slow
@needs_chromium
def test_demo(tmp_path: Path) -> None:
    started = time.monotonic()
    arguments = ["compare", "--recipe", str(ROOT / "experiments" / "demo.toml"), "--methods", ",".join(METHODS)]
    out, _ = RealRun([*arguments, "--seeds", "0,1,2", "--output", "demo", "--json"], tmp_path).finish()
    print(f"the demo took {time.monotonic() - started:.0f} s")
    summary = json.loads(out)
    assert list(summary["methods"]) == METHODS
    for method in summary["methods"].values():
        assert all(accuracy > 0.2 for accuracy in method["test_accuracy"]["values"]), "16 classes, 0.06 by chance"
    check_page(tmp_path / "demo" / "report.html", num_figures(tmp_path / "demo"))
