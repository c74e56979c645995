"""Bad input: exit code, one clear message, nothing started, nothing lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from copra_fl import events
from copra_fl.cli import main
from copra_fl.cli.compare import with_all
from copra_fl.config import Config, ConfigError
from copra_fl.simulation.progress import State, watch
from copra_fl.simulation.recipes import Recipe
from tests.support.real_runs import SCRIPT, settings
from tests.support.tiny import Settings

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Standard error of a command that must end with `code`, called as the console script calls it."""

    def call(arguments: list[str], cwd: Path, code: int = 2) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr("sys.argv", ["copra-fl", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert caught.value.code == code, captured.out + captured.err
        return " ".join(captured.err.split())

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Data files that cannot be used, and one that can."""
    (tmp_path / "empty.csv").write_text("")
    pd.DataFrame({"text": ["a"] * 90, "label": ["x"] * 90}).to_csv(tmp_path / "one-class.csv", index=False)
    pd.DataFrame({"words": ["a"], "label": ["x"]}).to_csv(tmp_path / "columns.csv", index=False)
    pd.DataFrame({"text": [f"sea{i}" for i in range(40)], "label": ["x", "y"] * 20}).to_csv(
        tmp_path / "small.csv", index=False
    )
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning-rat": 1}, "unknown configuration key 'learning-rat'. Did you mean 'learning-rate'"),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"alpha": 0}, "alpha = 0.0 must be more than 0"),
        ({"rule": "fedavgg"}, "unknown rule 'fedavgg'. Did you mean 'fedavg'?"),
        ({"dataset": "health-tweet"}, "unknown data set 'health-tweet'. Did you mean 'health-tweets'?"),
        ({"dataset": "none.csv"}, "there is no file"),
        ({"dataset": "empty.csv"}, "has no examples"),
        ({"dataset": "columns.csv"}, "text-column = 'text' is not a column of"),
        ({"dataset": "one-class.csv"}, "has one label only"),
        ({"dataset": "small.csv", "num-clients": 50}, "50"),
        ({"target-modules": "query,valeu"}, "target-modules: 'valeu' matches no linear module"),
        ({"model": "no/such-model"}, "run `hf download no/such-model --local-dir FOLDER` on a machine with a network"),
        ({"num-clients": 0}, "num-clients = 0: say how many clients to simulate"),
        ({"device": "cuda"}, "torch sees no CUDA device"),
        ({"empty-clients": "refuse", "partitioner": "dirichlet", "alpha": 0.01}, "have no training examples"),
    ],
)
def test_bad_settings(refused: Refused, tiny: Settings, files: Path, changes: Settings, message: str) -> None:
    small = {"server-validation-examples": 5, "test-examples": 5} if "small.csv" in changes.values() else {}
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    err = refused(["simulate", *settings(tiny | small | changes), "--output", "run"], files)
    assert message in err
    assert not (files / "run").exists(), "nothing was started, no empty folder is left behind"


def test_unknown_method_recipe_and_option(refused: Refused, tmp_path: Path) -> None:
    assert "unknown method 'copar'. Did you mean 'copra'?" in refused(["compare", "--methods", "lora,copar"], tmp_path)
    assert "no recipe file 'nothing.toml'" in refused(["simulate", "--recipe", "nothing.toml"], tmp_path)
    assert "--seeds '0,x' is not a list of whole numbers" in refused(["compare", "--seeds", "0,x"], tmp_path)
    assert "names a seed twice" in refused(["compare", "--seeds", "1,1"], tmp_path)
    assert "names a method twice" in refused(["compare", "--methods", "lora, lora"], tmp_path)
    assert "not of the form KEY=VALUE" in refused(["simulate", "--set", "rank"], tmp_path)
    assert "No such option" in refused(["simulate", "--nonsense"], tmp_path)
    (tmp_path / "bad.toml").write_text("rank = = 3")
    assert "is not valid TOML" in refused(["simulate", "--recipe", "bad.toml"], tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.toml"]


def test_a_combination_that_cannot_be_is_refused_with_the_reason(
    refused: Refused, tmp_path: Path, tiny: Settings
) -> None:
    methods = ["--methods", "fedavg,fedsa-lora+copra"]
    err = refused(["compare", *settings(tiny), *methods, "--output", "both"], tmp_path)
    assert "rule = 'fedsa-lora' does not combine with local-training = 'copra': a client keeps its own B" in err
    assert "unknown method 'copar'" in refused(["compare", "--methods", "fedavg+copar"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_is_every_method_once_and_names_what_it_leaves_out(
    tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = with_all({"all": "all"}, Recipe(tiny), Console(stderr=True))
    assert list(methods)[:2] == ["fedavg", "fedavg+copra"]
    assert methods.keys() >= {"head", "fedsa-lora", "ffa-lora", "ffa-lora+copra", "fedadam+copra", "scaffold"}
    assert not methods.keys() & {"lora", "copra", "head+copra", "fedsa-lora+copra"}
    assert "note: fedsa-lora+copra is left out: rule = 'fedsa-lora' does not combine" in capsys.readouterr().err
    assert list(with_all({"lora": "lora", "all": "all"}, Recipe(tiny), Console(quiet=True))) == ["lora", *methods]


def test_all_with_what_no_rule_can_do_is_refused(tiny: Settings) -> None:
    with pytest.raises(ConfigError, match="^unknown rule 'flor'.*Known: [^\n]*$"):
        with_all({"all": "all"}, Recipe(tiny, overrides={"rule": "flor"}), Console(quiet=True))


def test_output_that_exists(refused: Refused, tmp_path: Path, tiny: Settings) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    err = refused(["simulate", "--output", "mine"], tmp_path)
    assert "is not a run of copra-fl" in err
    refused(["simulate", "--output", "mine", "--overwrite"], tmp_path)
    refused(["simulate", "--output", "mine", "--resume"], tmp_path)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_resume_with_a_changed_configuration_names_the_keys(refused: Refused, tmp_path: Path, tiny: Settings) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(Config.from_flat(tiny).to_toml())
    assert "--resume goes on with it" in refused(["simulate", *settings(tiny), "--output", "run"], tmp_path)
    changed = settings(tiny | {"learning-rate": 0.5, "rank": 3})
    err = refused(["simulate", *changed, "--output", "run", "--resume"], tmp_path)
    assert "rank: 2 -> 3" in err and "learning-rate: 0.002 -> 0.5" in err


def test_overwrite_with_a_bad_configuration_throws_nothing_away(
    refused: Refused, tmp_path: Path, tiny: Settings
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(Config.from_flat(tiny).to_toml())
    refused(["simulate", *settings(tiny | {"rule": "none"}), "--output", "run", "--overwrite"], tmp_path)
    both = ["simulate", *settings(tiny), "--output", "run", "--overwrite", "--resume"]
    assert "contradict each other" in refused(both, tmp_path)
    assert (tmp_path / "run" / "config.toml").exists()


def test_report_of_a_folder_that_is_none(refused: Refused, tmp_path: Path) -> None:
    refused(["report", str(tmp_path)], tmp_path)


def test_help_and_version_are_fast_and_complete(tmp_path: Path) -> None:
    out = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(command in out for command in ("simulate", "compare", "report", "assets"))


def test_clients_count_when_they_are_trained_or_their_reply_is_there() -> None:
    """Of workers on other machines only replies are heard."""
    state = State()
    told = [("trained", 1.5), ("replied", 3), ("trained", 0.5), ("replied", 6)]
    state.move({"event": "round", "round": 1, "clients": 6})
    done = []
    for event, clients in told:
        state.move({"event": event, "clients": clients})
        done.append(state.clients_done)
    assert done == [1.5, 3, 3.5, 6]


def test_what_runs_of_a_comparison_note_alike_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    for _ in range(2):
        events.emit("note", text="clients train one by one")
        events.emit("finished", accuracy=None)
    link: Any = SimpleNamespace(environment={events.VARIABLE: str(tmp_path / "events")})
    watch(link, subprocess.Popen(["true"]), 2, Console())
    assert capsys.readouterr().out.count("note: clients train one by one") == 1
