"""Folders of runs as they are read: unfinished, damaged, of another version, or of no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from copra_fl.config import ConfigError
from copra_fl.reporting.report import write
from copra_fl.reporting.results import ResultsError, load_comparison, load_run
from tests.support.run_folders import write_comparison, write_run


def test_half_a_journal_line_is_not_a_round(tmp_path: Path) -> None:
    """A run killed while it was writing."""
    write_run(tmp_path / "run", "copra", 0, finished=False)
    with (tmp_path / "run" / "journal.jsonl").open("a") as journal:
        journal.write('{"round": 4, "seco')
    assert [record.round for record in load_run(tmp_path / "run").journal] == [1, 2, 3]


@pytest.mark.parametrize("name", ["journal.jsonl", "summary.json", "provenance.json"])
def test_a_run_of_another_version_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    """Even if its settings have changed, too: the folder is of another version, not its configuration wrong."""
    write_run(tmp_path / "run", "copra", 0, num_rounds=1)
    (tmp_path / "run" / name).write_text('{"seeds": {"root": 0}}\n')
    (tmp_path / "run" / "config.toml").write_text("prefix-cache = 0\n")
    message = f"{name}: not a .* of this version of copra-fl, and results of other versions cannot be read: .*"
    with pytest.raises(ResultsError, match=message):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b'{"method": "cop', "summary.json: not valid JSON"),
        ("summary.json", b"\xff\xfe", "summary.json: not valid JSON"),
        ("config.toml", b"nonsense = 3", "config.toml: unknown configuration key 'nonsense'"),
        ("probe-merge.figures.json", b'{"title": "Mer', "probe-merge.figures.json is damaged or of another version"),
        ("probe-merge.figures.json", b'{"titel": "Merging"}', "probe-merge.figures.json is damaged or of another"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_run(tmp_path / "run", "copra", 0)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises((ResultsError, ConfigError), match=f"{tmp_path}/run/{message}"):
        write(tmp_path / "run")


def test_a_folder_that_load_run_cannot_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=f"{tmp_path}/gone is not the folder of a run: it does not exist"):
        load_run(tmp_path / "gone")
    with pytest.raises(ResultsError, match="it is a comparison: name one of the runs in it, .*load_comparison"):
        load_run(write_comparison(tmp_path / "comparison", seeds=[0]))


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not the folder of a run or comparison"):
        load_comparison(tmp_path)
    write_run(tmp_path / "run", "copra", 0, num_rounds=1, finished=False)
    (tmp_path / "run" / "journal.jsonl").unlink()
    with pytest.raises(ResultsError, match="no finished round"):
        load_comparison(tmp_path / "run")
