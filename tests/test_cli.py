"""Commands with bad input: exit code, one clear message, nothing started, nothing lost."""

from __future__ import annotations

import errno
import importlib.metadata
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from rich.text import Text

from copra_fl.aggregation import accounting
from copra_fl.cli.compare import plan
from copra_fl.cli.options import complete_method, complete_recipe, complete_setting
from copra_fl.config import Config, ConfigError
from copra_fl.console import plain_console
from copra_fl.data.federated import load_data
from copra_fl.files import in_words, sha256
from copra_fl.models.build import load_processor
from copra_fl.simulation import preflight
from copra_fl.simulation.comparison import expand_all, find_plan, refuse_dropped, write_plan
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe
from copra_fl.sources.assets import ASSETS, Asset
from tests.support.command_line import all_commands, root_command, run_command
from tests.support.real_runs import SCRIPT, settings
from tests.support.run_folders import write_run
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
        ({"lr": 0.1}, "unknown configuration key 'lr'. Did you mean 'learning-rate'"),
        ({"rank": 10**8}, "the run does not fit into memory: "),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"rule": "fedavgg"}, "unknown rule 'fedavgg'. Did you mean 'fedavg'?"),
        ({"dataset": "health-tweet"}, "unknown data set 'health-tweet'. Did you mean 'health-tweets'?"),
        ({"dataset": "none.csv"}, "there is no file"),
        ({"dataset": "empty.csv"}, "has no examples"),
        ({"dataset": "columns.csv"}, "text-column = 'text' is not a column of"),
        ({"dataset": "one-class.csv"}, "has one label only"),
        ({"dataset": "small.csv", "num-clients": 50}, "num-clients = 50"),
        ({"target-modules": "query,valeu"}, "target-modules: 'valeu' matches no linear module"),
        ({"target-modules": "layer.7.attention.self.query"}, "encoder.layer.0.attention.self.query names one of them"),
        ({"model": "no/such-model"}, "run `hf download no/such-model --local-dir FOLDER` on a machine with a network"),
        ({"max-length": 513}, "max-length = 513 is more than the 512 tokens that model ="),
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
        (["compare", "--methods", "lora, lora"], "method 'lora' is named twice; name it once"),
        (["compare", "--seeds", "0,x"], "--seeds '0,x' is not a list of whole numbers"),
        (["compare", "--seeds", "1,1"], "--seeds '1,1' names a seed twice"),
        (["simulate", "--recipe", "nothing.toml"], "no recipe file 'nothing.toml'"),
        (["simulate", "--recipe", "demoo"], "unknown recipe 'demoo'. Did you mean 'demo'?"),
        (["study", "base"], "the recipe has no table [study]; built-in recipes with one: demo, few-shot, passes"),
        (["simulate", "--recipe", "bad.toml"], "is not valid TOML"),
        (["simulate", "--recipe", "latin.toml"], "latin.toml is not text in UTF-8: byte 9 is 0xe9"),
        (["simulate", "--resume", "--output", "gone"], "--resume: there is no run in"),
        (["simulate", "--resume"], "--resume needs --output: the folder of the run to continue"),
        (["simulate", "--output", "/proc/runs/one"], "--output /proc/runs/one: cannot write in /proc: "),
        (["simulate", "--output", "bad.toml"], "bad.toml is a file, not a folder"),
        (["compare", "--output", "bad.toml/one"], "bad.toml is a file, not a folder"),
        (["study", "smoke", "--output", "bad.toml/one"], "bad.toml is a file, not a folder"),
        (["report", ".", "--figures", "bad.toml/one"], "bad.toml is a file, not a folder"),
        (["export", ".", "--to", "bad.toml/one"], "bad.toml is a file, not a folder"),
        (["probe", "merge", ".", "--output", "bad.toml"], "bad.toml is a file, not a folder"),
        (["bench", "--output", "bad.toml/one"], "bad.toml is a file, not a folder"),
        (["compare", "--set", "seed=3"], "--set seed=3 has no effect here: use --seeds, as in --seeds 0,1,2"),
        (["study", "smoke", "--set", "seed=3"], "--set seed=3 has no effect here: a study's seeds are those of its"),
        (["simulate", "--set", "rank"], "--set 'rank' must have the form KEY=VALUE"),
        (["simulate", "--nonsense"], "No such option"),
        (
            ["simulate", "--set", "p0=0.1"],
            "p0 = 0.1 has no effect with local-training = 'lora'; set local-training = 'copra'",
        ),
        (
            ["compare", "--methods", "lora,median", "--set", "rule=median"],
            "methods 'lora' and 'median' have the same settings here, so their runs would be the same; leave one out",
        ),
        (
            ["compare", "--methods", "lora,median", "--set", "p0=0.1"],
            "p0 = 0.1 has no effect with local-training = 'lora'; set local-training = 'copra'",
        ),
        (
            ["simulate", "--set", "client-column=hospital"],
            "client-column = 'hospital' has no effect with partitioner = 'dirichlet'; set partitioner = 'natural'",
        ),
        (
            ["compare", "--set", "server-learning-rate=0.1"],
            "server-learning-rate = 0.1 has no effect with server-optimizer = 'none'; set server-optimizer",
        ),
        (["simulate", "--set", "dp-budget=3"], "dp-budget = 3.0 has no effect with dp-clip = 0, where a run is not"),
        (
            ["compare", "--methods", "lora,half-layers", "--set", "full-rounds=1"],
            "full-rounds = 1 has no effect with layers-per-round = 0 and layer-selection = 'random'; set",
        ),
        (
            ["compare", "--methods", "lora,median", "--set", "trimmed-mean.trim-fraction=0.2"],
            "trimmed-mean.trim-fraction = 0.2 has no effect with rule = 'fedavg'; choose the rule with this parameter",
        ),
        (
            ["simulate", "--recipe", "shakespeare", "--set", "engine=trainer", "--set", "learning-rate=0.01"],
            "learning-rate = 0.01 has no effect with engine = 'trainer', where the script decides; set it in the",
        ),
        (["simulate", "--gpus-per-worker", "99"], "which has room for 0 such workers, not 1"),
        (["simulate", "--track", "tensorbord"], "unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (["report", "."], "is not the folder of a run or comparison"),
        (["track", ".", "--to", "tensorboard"], "is not the folder of a run or comparison"),
        (["probe", "shapley", "."], "is not the folder of a run"),
        (["chat", "."], "is not the folder of a run or of an adapter"),
        (["assets", "path", "mini-lm"], "unknown asset 'mini-lm'. Did you mean 'minilm'?"),
    ],
)
def test_wrong_arguments_are_exit_code_2(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "bad.toml").write_text("rank = = 3")
    (folder / "latin.toml").write_bytes(b'model = "\xe9"')
    assert message in run_command(*arguments, code=2).message
    assert {path.name for path in folder.iterdir()} == {"bad.toml", "latin.toml"}


def test_dp_clip_without_its_package_is_refused_before_the_data_are_prepared(
    folder: Path, tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    private = tiny | {"dp-clip": 1.0, "failures": "tolerant", "weighting": "equal", "dataset": "none.csv"}
    message = run_command("simulate", *settings(private), "--output", "run", code=2).message
    assert "dp-clip needs the package dp-accounting: pip install '" in message and "[privacy]'" in message


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    directory = tmp_path / "run"
    write_run(directory, "lora", 0)
    before = {path.name for path in directory.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = run_command("report", directory, code=1).message
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == f"copra-fl: cannot read or write {directory / 'report.html'}: File too large"
    assert {path.name for path in directory.iterdir()} == before


def test_a_full_disk_is_named() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/runs/report.html")
    assert in_words(error) == "the disk of /runs/report.html is full; free some space, then repeat the command"


def test_a_failure_that_is_not_the_user_s_is_exit_code_1(folder: Path, empty_cache: Path) -> None:
    assert "copra-fl: asset 'minilm' is not in" in run_command("assets", "path", "minilm", code=1).err


def test_methods_that_exclude_each_other_are_rejected_with_the_reason(folder: Path, tiny: Settings) -> None:
    methods = ["--methods", "fedavg,fedsa-lora+copra"]
    output = run_command("compare", *settings(tiny), *methods, "--output", "both", code=2)
    assert "rule = 'fedsa-lora' does not combine with local-training = 'copra': each client keeps its own B" in (
        output.message
    )
    assert not list(folder.iterdir())


def test_a_table_of_the_recipe_that_no_method_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    tables = {"copra": "learning-rate = 0.1", "fedavg": "p0 = 0.5", "mine": "rank = 3", "corpa": "learning-rate = 0.1"}
    recipe.write_text("\n".join(f"[methods.{name}]\n{line}" for name, line in tables.items()))
    plan(None, str(recipe), [], "copra,lora+mine", "0", plain_console(stderr=True))
    notes = " ".join(capsys.readouterr().err.split())
    assert "no method of this comparison has the settings of the recipe's table [methods.corpa]" in notes
    assert notes.count("note:") == 1


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


def test_a_resumed_comparison_keeps_the_methods_and_seeds_that_no_option_changes(folder: Path) -> None:
    console = Console(quiet=True)
    first = plan(None, "smoke", [], "lora,flora", "0,3", console)
    write_plan(folder, *first)
    earlier = find_plan(folder)
    assert earlier == first
    assert plan(earlier, None, [], None, None, console) == first
    assert plan(earlier, "smoke", [], None, None, console) == first, "not those of a new comparison"
    methods, seeds, configs = plan(earlier, "smoke", [], None, "0,1", console)
    assert (methods, seeds) == (["lora", "flora"], [0, 1])
    assert configs.keys() == {"lora-seed0", "flora-seed0", "lora-seed1", "flora-seed1"}
    methods, seeds, _ = plan(earlier, "smoke", [], "lora,copra", None, console)
    assert (methods, seeds) == (["lora", "copra"], [0, 3])
    assert plan(None, "smoke", [], None, None, console)[:2] == (["lora", "copra"], [0, 1, 2])


def test_a_resume_with_another_recipe_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    first = plan(None, "smoke", [], "lora", "0", console)
    write_plan(folder, *first)
    with pytest.raises(ConfigError, match=r"cannot resume .*/lora-seed0 .*; repeat the recipe and the settings"):
        write_plan(folder, *plan(first, None, [], "head,lora", None, console))
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.toml", "lora-seed0"]
    assert find_plan(folder) == first


def test_a_resumed_comparison_keeps_the_runs_that_have_begun(folder: Path) -> None:
    first = plan(None, "smoke", [], "lora,head", "0,1", Console(quiet=True))
    (folder / "both").mkdir()
    write_plan(folder / "both", *first)
    (folder / "both" / "lora-seed1" / "journal.jsonl").touch()
    for option in (["--methods", "head"], ["--seeds", "0"]):
        output = run_command("compare", "--recipe", "smoke", *option, "--output", "both", "--resume", code=2)
        assert "would lose lora-seed1; name the methods and seeds of these runs too" in output.message
    refuse_dropped(folder / "both", first, ["lora-seed1", "copra-seed1"])


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
    assert f"a run is writing to {folder / 'run'}; stop it first" in output.message
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


def test_every_argument_and_option_has_help() -> None:
    """With click 8.5 the help of arguments was lost: typer 0.20 sets it before click's constructor does."""
    for words, command in all_commands(root_command(), []):
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{words}: {parameter.name}"


def test_help_shows_words_in_brackets() -> None:
    """Rich takes [study] for a style and drops it, unless it is escaped."""
    for words, command in all_commands(root_command(), []):
        for text in [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]:
            assert Text.from_markup(text or "").plain == (text or "").replace("\\[", "["), words


def test_every_example_in_help_is_a_command_with_known_options() -> None:
    commands = {" ".join(words): command for words, command in all_commands(root_command(), ["copra-fl"])}
    examples = [(name, line) for name, command in commands.items() for line in (command.epilog or "").split("\n\n")[1:]]
    assert len(examples) > 10
    for name, line in examples:
        assert line.startswith(name), line
        called = max((known for known in commands if f"{line} ".startswith(f"{known} ")), key=len)
        options = {text for parameter in commands[called].params for text in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= options, line


def test_version_and_completion() -> None:
    assert run_command("--version").out == f"copra-fl {importlib.metadata.version('copra-fl')}\n"
    assert complete_setting("partit") == ["partitioner="]
    assert complete_setting("partitioner=di") == ["partitioner=dirichlet"]
    assert complete_method("lora,flora+co") == ["lora,flora+connectivity", "lora,flora+copra"]
    assert complete_recipe("smo") == ["smoke"]


@pytest.mark.parametrize(
    ("command", "continued"),
    [
        ("simulate", ". To continue after the last finished round, repeat the command with --resume and the --output"),
        ("compare", ". To continue after the last finished round, repeat the command with --resume and the --output"),
        ("study smoke", ". To continue after the last finished round, repeat the command"),
        ("predict runs/notes --data notes.csv --to labels.csv", ""),
    ],
)
def test_ctrl_c_names_how_to_continue_where_that_is_possible(
    command: str, continued: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("copra_fl.simulation.recipes.Recipe.read", "copra_fl.startup.prepare"):
        monkeypatch.setattr(place, interrupt)
    message = run_command(*command.split(), code=130).message
    assert re.sub(" of the (run|comparison)$", "", message) == f"copra-fl: stopped{continued}"


def test_an_asset_comes_before_a_folder_of_its_name(
    tiny: Settings, folder: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would fetch the asset and use the folder."""

    def unpack_texts(archive: Path, target: Path) -> None:
        pd.read_csv(archive).to_parquet(target / "train.parquet")

    def unpack_model(archive: Path, target: Path) -> None:
        shutil.copytree(archive.parent, target, dirs_exist_ok=True)

    def asset(name: str, kind: Literal["data", "model"], file: Path, unpack: Callable[[Path, Path], None]) -> Asset:
        return Asset(name, "none", "1", sha256(file), 1, kind, "", "", lambda *_: file, unpack)

    texts = asset("our-texts", "data", Path(str(tiny["dataset"])), unpack_texts)
    model = asset("our-bert", "model", Path(str(tiny["model"])) / "model.safetensors", unpack_model)
    for of_a_user in (texts, model):
        monkeypatch.setitem(ASSETS, of_a_user.name, of_a_user)
        (folder / of_a_user.name).mkdir()
    config = Config.from_flat(tiny | {"dataset": "our-texts", "model": "our-bert"})
    (checked,) = preflight.check([config], Console(quiet=True), WorkerRequest(1, 0, None))
    assert (checked.data.dataset, checked.model.model) == ("our-texts", "our-bert")


def test_clients_that_cannot_train_are_named_before_anything_starts(tiny: Settings) -> None:
    """The one client that is deep enough has no examples."""
    config = Config.from_flat(tiny | {"num-clients": 12, "alpha": 0.02})
    (without_examples, *_) = load_data(config, load_processor(config.model)).skipped
    depths = ",".join("3" if client == without_examples else "1" for client in range(12))
    config = config.changed(client_depths=depths, min_depth=3)
    with pytest.raises(ConfigError, match="there are no clients with data and of depth 3 or more, among 12"):
        preflight.check([config], Console(quiet=True), WorkerRequest(1, 0, None))
