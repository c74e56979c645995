"""`copra-fl clean` and keep-checkpoints: what nobody needs any more goes, everything else stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from clients.client_state import ClientState, ClientStateStore
from copra_fl.data.cache import cached
from tests.support.command_line import run_command
from tests.support.federations import assert_equal, final_adapter
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings

DAY = 86_400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a file or folder of each kind that goes, and one that stays."""
    cache = tmp_path / "[cache]"
    monkeypatch.setenv("COPRA_FL_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "400")
    for run in ("old", "new"):
        ClientStateStore(run).write(0, 1, ClientState(personal={"head.bias": torch.ones(250)}), 0)
    (old,) = (cache / "clients" / "old").iterdir()
    table = cache / "tables" / "old.parquet"
    table.parent.mkdir()
    table.touch()
    for path in (old, table):
        os.utime(path, (time.time() - 40 * DAY,) * 2)
    for name in ("here", "gone"):
        source = tmp_path / f"[{name}].csv"  # brackets are no markup
        source.write_text("text,label\n")
        cached("tokens", name, lambda: ({"ids": torch.arange(3)}, {}), str(source))
    cached("tokens", "an-asset", lambda: ({"ids": torch.arange(3)}, {}), "health-tweets")
    (tmp_path / "[gone].csv").unlink()
    (cache / "tokens" / "damaged.safetensors").touch()
    for name in ("killed", "running"):
        (cache / "assets" / f"{name}.part").mkdir(parents=True)
    return cache


GOES = [
    "clients/old",
    "tables/old.parquet",
    "tokens/gone.safetensors",
    "tokens/damaged.safetensors",
    "assets/killed.part",
]
STAYS = ["clients/new", "tokens/here.safetensors", "tokens/an-asset.safetensors", "assets/running.part"]


def test_the_cache_is_cleaned(cache: Path) -> None:
    with FileLock(cache / "assets" / "running.lock"):
        listed = run_command("clean", "--dry-run").out
        assert all((cache / name).exists() for name in (*GOES, *STAYS)), "--dry-run removes nothing"
        removed = run_command("clean").out
        again = run_command("clean", "--days", "0").out
    assert "5 files and folders can be removed: 0.00 MB" in listed and "5 files and folders removed" in removed
    for name in GOES:
        assert str(cache / name) in listed.replace("\n", "") and not (cache / name).exists()
    assert "last used 40 days ago" in listed and "[gone].csv, which is gone" in listed
    assert "1 files and folders removed" in again and not (cache / "clients" / "new").exists()
    assert all((cache / name).exists() for name in STAYS[1:])


def test_finished_runs_keep_their_newest_checkpoints(cache: Path, tmp_path: Path) -> None:
    for name, summary in (("finished", True), ("stopped", False)):
        folder = tmp_path / "runs" / name / "checkpoints"
        folder.mkdir(parents=True)
        for number in range(1, 4):
            (folder / f"round-{number:05d}.safetensors").write_bytes(bytes(number))
        if summary:
            (folder.parent / "summary.json").write_text("{}")
    run_command("clean", tmp_path / "runs", "--keep", "2")
    left = {path.relative_to(tmp_path / "runs").as_posix() for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert left == {
        *(f"finished/checkpoints/round-0000{number}.safetensors" for number in (2, 3)),
        *(f"stopped/checkpoints/round-0000{number}.safetensors" for number in (1, 2, 3)),
    }
    assert "holds no run" in run_command("clean", cache, code=2).message


def test_a_run_keeps_as_many_checkpoints_as_it_is_told_and_resumes_from_them(tiny: Settings, tmp_path: Path) -> None:
    whole = run_federation(tiny | {"num-rounds": 4}, tmp_path / "whole")
    few = run_federation(tiny | {"num-rounds": 4, "keep-checkpoints": 2}, tmp_path / "few")
    assert [path.name for path in sorted((few / "checkpoints").iterdir())] == [
        "round-00003.safetensors",
        "round-00004.safetensors",
    ]
    (few / "summary.json").unlink()
    (few / "checkpoints" / "round-00004.safetensors").unlink()
    run_federation(tiny | {"num-rounds": 4, "keep-checkpoints": 2}, few)
    assert_equal(final_adapter(few), final_adapter(whole))
