"""Errors of the Python API in Python's words, and the snippets of docs/how-to/python.md."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import copra_fl
from copra_fl import Config, ConfigError, RunFailed, TableError, compare, simulate
from copra_fl.api.inputs import store_table
from copra_fl.api.words import python_words, reworded
from tests.support.command_line import root_command
from tests.support.documents import ROOT, blocks
from tests.support.tiny import Settings


def test_errors_name_the_table_that_was_passed(tiny: Settings, tmp_path: Path) -> None:
    """Not the files of the cache that other processes read."""
    frame = pd.read_csv(str(tiny["dataset"]))
    settings = {name.replace("-", "_"): value for name, value in tiny.items() if name != "dataset"}

    def message(error: type[ConfigError], **changes: Any) -> str:
        with pytest.raises(error) as raised:
            simulate(**(settings | {"data": frame, "output": tmp_path / "run"} | changes))
        return str(raised.value)

    missing = message(TableError, text_column="nots")
    assert missing.startswith("text-column = 'nots' is not a column of the table passed as data; its columns are text")
    new = message(ConfigError, test_data=frame.head(3).assign(label="new"))
    assert new.startswith("the table passed as test_data has labels that do not occur in the table passed as data: new")
    earlier = Config().changed(dataset=store_table("data", frame.head(9)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(earlier.to_toml())
    changed = message(ConfigError, resume=True, recipe="base")
    assert "dataset: a table of an earlier call -> the table passed as data; " in changed
    assert changed.endswith(
        "repeat the recipe and the settings of the first call, or start a new run in another folder"
    )


def test_errors_name_arguments() -> None:
    """In place of every option that a call takes too, also in the errors of the server app."""
    for command, call in (("simulate", simulate), ("compare", compare)):
        options = {parameter.name: parameter for parameter in root_command().commands[command].params}
        for name in options.keys() & signature(call).parameters:
            told = reworded(f"use {options[name].opts[0]}.", {})
            assert told == (f"use {name}=True." if name in ("resume", "overwrite") else f"use {name}."), name
    with pytest.raises(RunFailed, match=r"^round 2 is refused\. resume=True does the round again$"), python_words({}):
        raise RunFailed("round 2 is refused. --resume does the round again")
    with pytest.raises(ConfigError, match="for example num_clients=8 or dora=True$"), python_words({}):
        raise ConfigError("for example --set num-clients=8 or --set dora=true")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, Any]]:
    """The Python blocks of the page, and the names that its first block defines."""
    monkeypatch.chdir(tmp_path)
    return blocks("docs/how-to/python.md", "python"), {
        "copra_fl": copra_fl,
        "notes": pd.read_csv(ROOT / "docs/tutorials/notes.csv"),
    }


def test_the_page_names_the_class_of_each_error(
    page: tuple[list[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each `except` of the page names the class itself, and not one above it."""
    (snippet,) = (block for block in page[0] if "except" in block)
    checked = snippet.replace("    print(error)", "    print(type(error).__name__, error)")
    exec(checked, page[1])
    names = [
        line.split(":")[0].removeprefix("except copra_fl.").split(" ")[0]
        for line in snippet.splitlines()
        if "except" in line
    ]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == names == ["ConfigError", "TableError", "ResultsError"]
    assert "Did you mean 'learning_rate'?" in printed[0] and "'nots' is not a column of the table passed" in printed[1]


@pytest.mark.slow
def test_the_callback_of_the_page_prints_each_round(
    page: tuple[list[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = (block for block in page[0] if "callback=watch" in block)
    exec(snippet, page[1])
    history = page[1]["run"].history
    expected = [
        f"round {number}: accuracy {row.validation_accuracy:.1%}, loss {row.train_loss:.2f}"
        for number, row in history.iterrows()
    ]
    assert capsys.readouterr().out.splitlines() == expected and len(expected) == 2
