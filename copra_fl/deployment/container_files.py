"""Read what containers write, on the host: a container can put links, pipes and endless files into its folders.

A link is not followed, not even one that a container swaps in between two system calls, and nothing waits for a pipe.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import
    from copra_fl.reporting.results import Run


#: the files that `load_run` reads
RUN_FILES = ("config.toml", "provenance.json", "journal.jsonl", "summary.json")
#: largest file that is read, in bytes
MAX_BYTES = 1 << 30


def run_folders(runs: Path) -> Iterator[Path]:
    """Yield the folders of runs below `runs`, in the order in which the runs were started; links are no folders."""
    started = []
    for entry in os.scandir(runs):
        config = Path(entry.path) / "config.toml"
        if entry.is_dir(follow_symlinks=False) and (status := _lstat(config)):
            started.append((status.st_mtime, entry.name))
    return (runs / name for _, name in sorted(started))


def load_container_run(folder: Path) -> Run:
    """Load the run in `folder`. Raises OSError for links and the like, and what `load_run` raises."""
    from copra_fl.reporting.results import load_run  # slow to import

    with tempfile.TemporaryDirectory(prefix="copra-fl-") as scratch:
        for name in RUN_FILES:
            if _lstat(folder / name):
                (Path(scratch) / name).write_bytes(read_plain(folder, name))
        return replace(load_run(Path(scratch)), directory=folder)


def read_plain(folder: Path, name: str) -> bytes:
    """Return the content of the regular file `name` in `folder`, both of which are no links.

    Raises OSError for anything else, and for more than `MAX_BYTES`.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened)
    finally:
        os.close(opened)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{folder / name} is not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"{folder / name} has more than {MAX_BYTES} bytes")
    return content


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None
