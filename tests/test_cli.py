"""Commands with bad input: exit code, one clear message, nothing started, nothing lost."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock
from rich.console import Console

from copra_fl import events
from copra_fl.config import Config, ConfigError
from copra_fl.simulation.comparison import expand_all
from copra_fl.simulation.progress import ProgressState, watch
from copra_fl.simulation.recipes import Recipe
from tests.support.command_line import run_command
from tests.support.real_runs import SCRIPT, settings
from tests.support.tiny import Settings


@pytest.fixture
def data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with data files that cannot be used and a small one that can."""
    (tmp_path / "empty.csv").write_text("")
    pd.DataFrame({"text": ["a"] * 90, "label": ["x"] * 90}).to_csv(tmp_path / "one-class.csv", index=False)
    pd.DataFrame({"words": ["a"], "label": ["x"]}).to_csv(tmp_path / "columns.csv", index=False)
    pd.DataFrame({"text": [f"sea{i}" for i in range(40)], "label": ["x", "y"] * 20}).to_csv(
        tmp_path / "small.csv", index=False
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # One setting for each part that checks: the keys, their ranges, rule, data, model, device. The settings that
        # each part rejects are in its own tests.
        ({"learning-rat": 1}, "unknown configuration key 'learning-rat'. Did you mean 'learning-rate'"),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"rule": "fedavgg"}, "unknown rule 'fedavgg'. Did you mean 'fedavg'?"),
        ({"dataset": "health-tweet"}, "unknown data set 'health-tweet'. Did you mean 'health-tweets'?"),
        ({"dataset": "none.csv"}, "there is no file"),
        ({"dataset": "empty.csv"}, "has no examples"),
        ({"dataset": "columns.csv"}, "text-column = 'text' is not a column of"),
        ({"dataset": "one-class.csv"}, "has one label only"),
        ({"dataset": "small.csv", "num-clients": 50}, "num-clients = 50"),
        ({"target-modules": "query,valeu"}, "target-modules: 'valeu' matches no linear module"),
        ({"model": "no/such-model"}, "run `hf download no/such-model --local-dir FOLDER` on a machine with a network"),
        ({"num-clients": 0}, "num-clients = 0: set the number of clients to simulate"),
        ({"partitioner": "own"}, "partitioner = 'own' needs nodes with data files of their own"),
        ({"device": "cuda"}, "torch sees no CUDA device"),
        ({"empty-clients": "refuse", "partitioner": "dirichlet", "alpha": 0.01}, "have no training examples"),
    ],
)
def test_bad_settings(tiny: Settings, data_files: Path, changes: Settings, message: str) -> None:
    small = {"server-validation-examples": 5, "test-examples": 5} if "small.csv" in changes.values() else {}
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    output = run_command("simulate", *settings(tiny | small | changes), "--output", "run", code=2)
    assert message in output.message
    assert not (data_files / "run").exists(), "nothing was started, and no empty folder is left behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--methods", "lora,copar"], "unknown method 'copar'. Did you mean 'copra'?"),
        (["compare", "--methods", "fedavg+copar"], "unknown method 'copar'. Did you mean 'copra'?"),
        (["compare", "--methods", "lora, lora"], "--methods 'lora, lora' names a method twice"),
        (["compare", "--seeds", "0,x"], "--seeds '0,x' is not a list of whole numbers"),
        (["compare", "--seeds", "1,1"], "--seeds '1,1' names a seed twice"),
        (["simulate", "--recipe", "nothing.toml"], "no recipe file 'nothing.toml'"),
        (["simulate", "--recipe", "bad.toml"], "is not valid TOML"),
        (["simulate", "--set", "rank"], "--set 'rank' must have the form KEY=VALUE"),
        (["simulate", "--nonsense"], "No such option"),
        (["simulate", "--track", "tensorbord"], "unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (["report", "."], "is not the folder of a run or comparison"),
        (["track", ".", "--to", "tensorboard"], "is not the folder of a run or comparison"),
        (["probe", "shapley", "."], "is not the folder of a run"),
        (["chat", "."], "cannot read"),
        (["assets", "path", "mini-lm"], "unknown asset 'mini-lm'. Did you mean 'minilm'?"),
    ],
)
def test_wrong_arguments_are_exit_code_2(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "bad.toml").write_text("rank = = 3")
    assert message in run_command(*arguments, code=2).message
    assert list(folder.iterdir()) == [folder / "bad.toml"]


def test_a_failure_that_is_not_the_user_s_is_exit_code_1(folder: Path, empty_cache: Path) -> None:
    assert "copra-fl: asset 'minilm' is not in" in run_command("assets", "path", "minilm", code=1).err


def test_methods_that_exclude_each_other_are_rejected_with_the_reason(folder: Path, tiny: Settings) -> None:
    methods = ["--methods", "fedavg,fedsa-lora+copra"]
    output = run_command("compare", *settings(tiny), *methods, "--output", "both", code=2)
    assert "rule = 'fedsa-lora' does not combine with local-training = 'copra': each client keeps its own B" in (
        output.message
    )
    assert not list(folder.iterdir())


def test_all_is_every_method_once_with_a_note_for_each_that_is_left_out(
    tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = expand_all({"all": "all"}, Recipe(tiny), Console(stderr=True))
    assert list(methods)[:2] == ["fedavg", "fedavg+copra"]
    assert methods.keys() >= {"head", "fedsa-lora", "ffa-lora", "ffa-lora+copra", "fedadam+copra", "scaffold"}
    assert not methods.keys() & {"lora", "copra", "head+copra", "fedsa-lora+copra"}
    assert "note: fedsa-lora+copra is left out: rule = 'fedsa-lora' does not combine" in capsys.readouterr().err
    assert list(expand_all({"lora": "lora", "all": "all"}, Recipe(tiny), Console(quiet=True))) == ["lora", *methods]


def test_all_with_a_setting_that_excludes_every_method_is_rejected(tiny: Settings) -> None:
    with pytest.raises(ConfigError, match="^unknown rule 'flor'.*Known: [^\n]*$"):
        expand_all({"all": "all"}, Recipe(tiny, overrides={"rule": "flor"}), Console(quiet=True))


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_with_other_files_is_never_touched(folder: Path, options: list[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    output = run_command("simulate", "--output", "mine", *options, code=2)
    assert "is not empty and not a run of copra-fl" in output.message
    assert (folder / "mine" / "thesis.txt").read_text() == "years of work"


def test_resume_with_a_changed_configuration_names_the_keys(folder: Path, tiny: Settings) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(Config.from_flat(tiny).to_toml())
    output = run_command("simulate", *settings(tiny), "--output", "run", code=2)
    assert "holds a run: --resume continues it, --overwrite deletes it" in output.message
    changed = settings(tiny | {"learning-rate": 0.5, "rank": 3})
    message = run_command("simulate", *changed, "--output", "run", "--resume", code=2).message
    assert "rank: 2 -> 3" in message and "learning-rate: 0.002 -> 0.5" in message


@pytest.mark.parametrize("stranger", [".git", "notes.txt", "data"])
def test_overwrite_deletes_no_folder_with_anything_else_in_it(folder: Path, tiny: Settings, stranger: str) -> None:
    (folder / "run" / stranger).mkdir(parents=True)
    (folder / "run" / "config.toml").write_text("seed = 3\n")
    output = run_command("simulate", *settings(tiny), "--output", "run", "--overwrite", code=2)
    assert f"--overwrite would delete {folder / 'run' / stranger}, which no run has written" in output.message
    assert (folder / "run" / stranger).exists()


def test_overwrite_deletes_no_live_run(folder: Path, tiny: Settings) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text("seed = 3\n")
    with FileLock(folder / "run" / ".lock"):
        output = run_command("simulate", *settings(tiny), "--output", "run", "--overwrite", code=2)
    assert f"a run is writing to {folder / 'run'}; stop it before you --overwrite it" in output.message
    assert (folder / "run" / "config.toml").exists()


def test_overwrite_with_a_bad_configuration_deletes_nothing(folder: Path, tiny: Settings) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(Config.from_flat(tiny).to_toml())
    run_command("simulate", *settings(tiny | {"rule": "none"}), "--output", "run", "--overwrite", code=2)
    output = run_command("simulate", *settings(tiny), "--output", "run", "--overwrite", "--resume", code=2)
    assert "--resume continues a run and --overwrite deletes it: use one of them" in output.message
    assert (folder / "run" / "config.toml").exists()


def test_help_lists_every_command() -> None:
    out = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^│ (\w+)  ", out, re.MULTILINE)
    assert {
        "simulate", "compare", "study", "report", "track", "bench", "chat", "deploy", "probe", "assets"
    } <= set(listed)  # fmt: skip


def test_clients_count_when_they_are_trained_or_have_replied() -> None:
    """Workers on this machine report each trained client; of those on other machines only replies are known."""
    state = ProgressState()
    state.apply({"event": "round", "round": 1, "clients": 6})
    done = []
    for event, clients in [("trained", 1.5), ("replied", 3), ("trained", 0.5), ("replied", 6)]:
        state.apply({"event": event, "clients": clients})
        done.append(state.clients_done)
    assert done == [1.5, 3, 3.5, 6]


def test_a_note_that_several_runs_repeat_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    for _ in range(2):
        events.emit("note", text="clients train one by one")
        events.emit("finished", accuracy=None)
    link: Any = SimpleNamespace(environment={events.VARIABLE: str(tmp_path / "events")})
    watch(link, subprocess.Popen(["true"]), 2, Console())
    assert capsys.readouterr().out.count("note: clients train one by one") == 1
