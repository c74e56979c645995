"""Files and folders: the cache folder, digests, atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

#: columns of a line of `write_json`
JSON_WIDTH = 120


class CacheError(RuntimeError):
    """A cache folder that cannot be created or written. The message names the folder and what to do."""


def cache_dir() -> Path:
    """Return the folder for everything that can be computed again: COPRA_FL_CACHE, or ~/.cache/copra-fl.

    It is created if needed, readable by its owner only, because it can hold users' tokenized data.
    Raises CacheError if it cannot be created.
    """
    cache = Path(os.environ.get("COPRA_FL_CACHE") or "~/.cache/copra-fl").expanduser().absolute()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot create the cache folder {cache}: {error}. Set COPRA_FL_CACHE to another folder"
        ) from error
    return cache


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 of `parts` written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace `path` by a file with `content`: readers see the old file or the whole new one.

    The content is flushed to the disk before the file is renamed, so that this also holds after a power failure.
    `mode` is the permissions of a new file, before the umask.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON with `atomic_write`. Raises ValueError for NaN and infinities."""
    atomic_write(path, _json_text(value) + "\n")


def _json_text(value: object, indent: str = "") -> str:
    """Return JSON in which an object or array stands on one line where it fits: a file of results reads as a table."""
    line = json.dumps(value, allow_nan=False)
    if len(indent) + len(line) <= JSON_WIDTH or not isinstance(value, Mapping | list | tuple):
        return line
    inner = indent + " "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(key))}: {_json_text(item, inner)}" for key, item in value.items()]
    else:
        items = [_json_text(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"


def build_once(place: Path, build: Callable[[Path], Path]) -> None:
    """Make the folder `place` in one process, while other processes that need it wait.

    `build(scratch)` works in a new folder beside `place` and returns the finished folder in it, which is then renamed:
    an interrupted build leaves nothing at `place`.
    """
    scratch = place.with_suffix(".part")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if place.exists():
            return
        shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left one
        try:
            scratch.mkdir()
            build(scratch).rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
