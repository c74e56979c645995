"""The commands of experiments/ run with the arguments of their shortest run, and every recipe for its first round."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from copra_fl.config import Config
from copra_fl.simulation.recipes import Recipe
from tests.support.documents import ROOT
from tests.support.federations import finished_comparison, journal
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings

EXPERIMENTS = ROOT / "experiments"
COMMANDS = sorted(path for path in EXPERIMENTS.rglob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8"))
#: it starts a SuperLink and SuperNodes
SLOW = ("deployment.py",)
RECIPES = sorted(EXPERIMENTS.glob("*.toml"))
METHODS = sorted((EXPERIMENTS / "methods").glob("*.toml"))


@pytest.fixture(scope="module")
def paths(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the paths that a command's TINY may name, but for its own `folder`."""
    root = tmp_path_factory.mktemp("experiments")
    flat = tiny | {"rule": "fedavg", "num-clients": 2, "num-rounds": 1, "path-pairs": 0}
    comparison = finished_comparison(flat, ["lora", "copra"], [0, 1], root / "tweets" / "1x3" / "test")
    (root / "tiny.toml").write_text(Config.from_flat(flat).to_toml())
    shutil.copytree(ROOT / "docs" / "explanations", root / "docs" / "explanations")
    for page in (root / "docs" / "explanations").iterdir():
        text = page.read_text("utf-8").replace(".svg", "")  # drawing a chart takes Chromium
        page.write_text(re.sub("(?m)^[|].*\n", "", text), "utf-8")  # without the tables, which the commands make
    made = {"comparison": comparison, "config": root / "tiny.toml", "docs": root / "docs"}
    return {name: str(path) for name, path in made.items()} | {name: str(tiny[name]) for name in ("model", "dataset")}


@pytest.fixture
def one_thread_stays_here() -> Iterator[None]:
    """Restore the number of threads, which a command may set for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread_stays_here")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.name in SLOW else path for path in COMMANDS],
    ids=lambda path: path.stem,
)
def test_every_command_runs(
    path: Path, paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As `python -m` runs it, in this process. A new command is found by its `__main__` block, and needs a TINY."""
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    tiny = [word.format(**paths, folder=tmp_path) for word in shlex.split(module.TINY)]
    before = {name: Path(name).read_bytes() for name in tiny if Path(name).is_file()}
    monkeypatch.setattr("sys.argv", [str(path), *tiny])
    runpy.run_path(str(path), run_name="__main__")
    changed = [name for name, content in before.items() if Path(name).read_bytes() != content]
    assert capsys.readouterr().out or any(tmp_path.iterdir()) or changed, "it wrote or printed something"


def run_first_round(recipe: Recipe, method: str | None, folder: Path) -> None:
    flat = dict(recipe.config(method).changed(num_rounds=1).to_flat())
    assert [record["round"] for record in journal(run_federation(flat, folder))] == [1]
    assert (folder / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_round_of_every_recipe_runs(path: Path, tmp_path: Path) -> None:
    run_first_round(Recipe.read(str(path), []), None, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_the_first_round_of_every_method_runs(path: Path, tmp_path: Path) -> None:
    """With 6 clients: trimmed means need more than the 4 of the recipe."""
    run_first_round(Recipe.read("smoke", ["num-clients=6"]), path.stem, tmp_path / "run")
