"""Files and folders: the cache folder, digests, atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

SHA256 = re.compile("[0-9a-f]{64}")
#: columns of a line of `write_json`
JSON_WIDTH = 120
#: numbers of the errors that a user can mend: a full or read-only disk, a folder of somebody else
STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
#: age of a file, in seconds, from which its time of change tells every change apart
SETTLED_SECONDS = 2
#: file with the digests of a folder made by `build_once`, in the format of sha256sum
DIGESTS = "SHA256SUMS"


class CacheError(RuntimeError):
    """A cache folder that cannot be created or written. The message names the folder and what to do."""


class DamagedFile(ValueError):
    """A file that is not as it was written. The message names the file and the problem."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is damaged: {problem}")
        self.path = path


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


def kept_digest(files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return ``compute()``, a digest of the content of `files`. It is computed once, and again after they have changed.

    It is kept under the names, sizes and times of the files. Raises OSError for a file that is missing.
    """
    stamps = [
        (str(path.absolute()), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        for path in files
        for status in [path.stat()]
    ]
    changed = max((stamp[-1] for stamp in stamps), default=0) / 1e9
    if time.time() - changed < SETTLED_SECONDS:
        return compute()
    return kept_text(digest_of(stamps), SHA256, compute)


def kept_text(key: str, form: re.Pattern[str], compute: Callable[[], str]) -> str:
    """Return ``compute()``, computed once for all processes and kept in the cache under the digest `key`.

    A kept text that is not of the `form`, as a power failure can leave one, is computed again.
    """
    path = cache_dir() / "kept" / key
    if path.exists() and form.fullmatch(kept := path.read_text(encoding="utf-8", errors="replace")):
        return kept
    text = compute()
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, text)
    return text


def atomic_write(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace `path` by a file with `content`: readers see the old file or the whole new one.

    Content and name are flushed to the disk, in this order, so that this also holds after a power failure, and the new
    file survives one. `mode` is the permissions of a new file, before the umask. A link at `path` is replaced, and no
    link is followed: another user may write in the folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # a killed process may have left one
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(path.parent)


def copy_permissions(source: Path, files: Iterable[Path]) -> None:
    """Give `files` the permissions of `source`, a new file: safetensors makes its own readable by their owner only."""
    for file in files:
        file.chmod(source.stat().st_mode)


def in_words(error: OSError) -> str:
    """Return an error of the file system in one sentence: the file, the reason, and what to do about a full disk."""
    place = error.filename or error.filename2
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk{f' of {place}' if place else ''} is full; free some space, then repeat the command"
    return f"cannot read or write {place or 'a file'}: {error.strerror or error}"


def append_line(path: Path, line: str) -> None:
    """Append `line` to the file at `path` and flush it to the disk; a power failure leaves at most half a line.

    Half a line of before stays as it is, on a line of its own.
    """
    created = not path.exists()
    with open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        is_torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" * is_torn + line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    if created:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    an interrupted build leaves nothing at `place`. A folder whose files have changed since is named in the log and
    built again.
    """
    if not changed_files(place):
        return
    scratch = place.with_suffix(".part")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not (changed := changed_files(place)):
            return
        if place.exists():
            log.warning("%s is damaged (%s); it is built again", place, ", ".join(changed))
            shutil.rmtree(place)
        shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left one
        try:
            scratch.mkdir()
            built = build(scratch)
            digests = "".join(f"{sha256(built / name)}  {name}\n" for name in _names(built))
            atomic_write(built / DIGESTS, digests)
            built.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def changed_files(place: Path) -> list[str]:
    """Return the files of a folder made by `build_once` that are not as they were built; if in doubt, their list."""
    try:
        lines = (place / DIGESTS).read_text(encoding="utf-8").splitlines()
        digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return [DIGESTS]
    files = [place / name for name in digests]
    if not (missing := [name for name, file in zip(digests, files, strict=True) if not file.is_file()]):
        written = digest_of(list(digests.values()))
        if kept_digest(files, lambda: digest_of([sha256(file) for file in files])) == written:
            return []
    return missing or [name for name, digest in digests.items() if sha256(place / name) != digest]


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
