"""The tables of docs/explanations/findings.md equal those of the committed results."""

from __future__ import annotations

from pathlib import Path

from copra_fl.simulation.recipes import Recipe
from experiments import findings


def test_tables_equal_those_of_the_committed_results() -> None:
    page = findings.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") >= 4
    assert findings.filled(page) == page, "run `python -m experiments.findings`"
    assert [file for file, _ in findings.images(page) if not (findings.IMAGES / file).exists()] == []


def test_a_grid_with_a_hyphen_keeps_its_whole_name(tmp_path: Path) -> None:
    """The newer one of two files of a grid counts."""
    (results,) = (path for path, _ in findings.studies().values() if "headline" in path.name)
    for name in ("many-clients-20261126", "many-clients-20261201", "headline-20261125"):
        (tmp_path / f"study-{name}.json").write_bytes(results.read_bytes())
    assert {grid: path.name for grid, (path, _) in findings.studies(tmp_path).items()} == {
        "many-clients": "study-many-clients-20261201.json",
        "headline": "study-headline-20261125.json",
    }


def test_the_advised_methods_for_weak_clients_are_the_measured_ones() -> None:
    study = Recipe.read("passes", [])
    for advised, measured in (("top-layers", "depth-tiers+examples"), ("drawn-layers", "fedra+examples")):
        assert study.config(advised, seed=0) == study.config(measured, seed=0)
