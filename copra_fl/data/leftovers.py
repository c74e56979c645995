"""Files that nobody needs any more: states of clients of old runs, old tables and models from Python, tokens that are
damaged or of data that is gone, unfinished downloads.

They hold users' data or large tensors, and nothing else removes them: a node does not learn when a run is over.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from copra_fl.config import ConfigError
from copra_fl.data.cache import SOURCE
from copra_fl.files import DamagedFile
from copra_fl.tensor_files import read_tensors

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can be removed, and the reason."""

    path: Path
    reason: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes, of a folder with everything in it."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def remove(self) -> None:
        """Remove the file or folder."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()


def in_cache(cache: Path, days: float) -> Iterator[Leftover]:
    """Yield what can be removed from the folder `cache`; clients' states, tables and models count as old after `days`
    days without use.
    """
    for folder in sorted(cache.glob("clients/*")):
        newest = max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)
        age = (time.time() - newest) / SECONDS_PER_DAY
        if age > days:
            yield Leftover(folder, f"clients' states of a run, last used {age:.0f} days ago")
    for file in sorted([*cache.glob("tokens/*.safetensors"), *cache.glob("files/*.safetensors")]):
        try:
            source = read_tensors(file)[1].get(SOURCE)
        except DamagedFile:
            yield Leftover(file, "damaged")
            continue
        if source and not Path(source).exists():
            yield Leftover(file, f"content of {source}, which is gone")
    for path in sorted([*cache.glob("tables/*.parquet"), *filter(Path.is_dir, cache.glob("models/*"))]):
        age = (time.time() - path.stat().st_mtime) / SECONDS_PER_DAY
        if age > days and path.suffix != ".part":
            yield Leftover(path, f"a table or model from Python, last used {age:.0f} days ago")
    for folder in sorted(cache.glob("*/*.part")):
        try:
            with FileLock(folder.with_suffix(".lock"), timeout=0):
                yield Leftover(folder, "unfinished: its process was killed")
        except Timeout:
            continue


def in_runs(directories: Iterable[Path], keep: int) -> Iterator[Leftover]:
    """Yield all but the newest `keep` checkpoints of each finished run in `directories` and in folders below them.

    Raises ConfigError for a folder without a run.
    """
    for directory in directories:
        folders = sorted(directory.rglob("checkpoints"))
        if not folders:
            raise ConfigError(f"{directory} holds no run")
        for folder in folders:
            if (folder.parent / "summary.json").exists():
                for path in sorted(folder.glob("round-*.safetensors"))[:-keep]:
                    yield Leftover(path, "checkpoint of a finished run")
