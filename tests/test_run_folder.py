"""The output folder of runs: which command continues it, and what happens to it while a run goes on."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from copra_fl.config import Config, ConfigError
from copra_fl.simulation import comparison, run_folder, single_run
from copra_fl.simulation.run_folder import choose_output, write_config
from tests.support.command_line import run_command

CONFIG = Config().changed(num_rounds=2)
LONGER = CONFIG.changed(num_rounds=3)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The run configurations that Flower got: it is replaced by a list of them."""
    submitted: list[dict[str, Any]] = []

    @contextmanager
    def superlink(*arguments: object) -> Iterator[Any]:
        yield SimpleNamespace(start_run=lambda run_config, workers: submitted.append(run_config))

    for module in (single_run, comparison):
        monkeypatch.setattr(module, "superlink", superlink)
    monkeypatch.setattr(single_run.preflight, "check", lambda configs, *arguments: list(configs))
    monkeypatch.setattr(single_run.progress, "watch_tracked", lambda *arguments: None)
    return submitted


def simulate(directory: Path, config: Config, **options: bool) -> None:
    """Run `run_single` with the stand-ins of `started`."""
    request: Any = SimpleNamespace(ray_address=None, allocate=lambda configs, console: None)
    single_run.run_single(directory, config, Console(quiet=True), request, **options)


def compare(directory: Path, config: Config, overwrite: bool = False) -> None:
    """Run `run_comparison` with one method and the stand-ins of `started`."""
    request: Any = SimpleNamespace(ray_address=None, allocate=lambda configs, console: None)
    configs = {"lora-seed0": config}
    comparison.run_comparison(directory, ["lora"], [0], configs, Console(quiet=True), request, overwrite)


def content(folder: Path) -> dict[str, str]:
    """Return path -> text of the files in the folder, without its lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


@pytest.mark.parametrize(("wrong", "right"), [("simulate", "compare"), ("compare", "simulate")])
def test_a_resume_of_the_other_kind_names_the_right_command(
    started: list[dict[str, Any]], tmp_path: Path, wrong: str, right: str
) -> None:
    folder = tmp_path / "run"
    (compare if right == "compare" else simulate)(folder, CONFIG)
    before = content(folder)
    message = run_command(wrong, "--resume", "--output", folder, code=2).message
    assert message.endswith(f"to continue it: copra-fl {right} --resume --output {folder}")
    assert content(folder) == before
    assert choose_output(folder, right, resume=True, overwrite=False) == folder


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: simulate(folder, LONGER, resume=True),
        lambda folder: simulate(folder, LONGER, overwrite=True),
        lambda folder: compare(folder, LONGER, overwrite=True),
    ],
    ids=["longer", "overwrite", "overwrite by a comparison"],
)
def test_nothing_changes_in_the_folder_of_a_live_run(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(run_folder, "RELEASE_SECONDS", 0)
    simulate(tmp_path / "run", CONFIG)
    before = content(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ConfigError, match="a run is writing to"):
        change(tmp_path / "run")
    assert content(tmp_path / "run") == before and len(started) == 1
    change(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock", timeout=0):
        assert len(started) == 2, "the server app can lock the folder"


@pytest.mark.parametrize("run", [simulate, compare])
def test_overwrite_of_a_link_deletes_what_is_in_the_folder_behind_it(
    started: list[dict[str, Any]], tmp_path: Path, run: Callable[..., None]
) -> None:
    link, folder = tmp_path / "link", tmp_path / "folder"
    folder.mkdir()
    (folder / "config.toml").write_text("seed = 3")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "round").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "adapter").touch()
    (folder / "adapter").symlink_to(tmp_path / "elsewhere")
    link.symlink_to(folder)
    run(choose_output(link, "simulate", resume=False, overwrite=True), CONFIG, overwrite=True)
    assert link.is_symlink() and (tmp_path / "elsewhere" / "adapter").exists()
    assert set(content(folder).values()) - {'methods = ["lora"]\nseeds = [0]\n'} == {CONFIG.to_toml()}
    assert not (folder / "checkpoints").exists() and not (folder / "adapter").exists()


def test_a_folder_with_nothing_but_a_lock_is_empty(tmp_path: Path) -> None:
    """A command that was killed just before it wrote the configuration leaves one."""
    (tmp_path / ".lock").touch()
    assert choose_output(tmp_path, "simulate", resume=False, overwrite=False) == tmp_path


def test_a_full_disk_leaves_the_configuration_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    write_config(tmp_path, CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_config(tmp_path, LONGER, lengthen=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == {"config.toml": CONFIG.to_toml()}
