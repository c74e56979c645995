"""Hide the key of a SuperLink or SuperNode from the apps that it starts, which run as the same user (Linux).

The process reads the key into memory before it starts anything, then takes from itself and all its descendants the
right to open the file again. Landlock does that without privileges, but only knows permissions to grant: everything is
readable except the key. A process that cannot be dumped keeps its memory and descriptors from processes of its user.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

#: system calls, the same on all architectures, and constants of linux/landlock.h and linux/prctl.h
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, REFER, PATH_BENEATH, GET_VERSION = 1 << 2, 1 << 13, 1, 1
SET_DUMPABLE, SET_NO_NEW_PRIVS = 4, 38


class PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr: `allowed_access` below the opened file or folder `parent_fd`."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def hide(arguments: Sequence[str], option: str) -> list[str]:
    """Return `arguments` with a copy in memory in place of the file in ``option=FILE``, which is no longer readable.

    To be called before the process has threads: those that exist keep their rights.
    """
    prefix, hidden = f"{option}=", []
    for argument in arguments:
        if argument.startswith(prefix):
            path = Path(argument.removeprefix(prefix)).resolve()
            copy = os.memfd_create(path.name)
            os.write(copy, path.read_bytes())
            try:
                deny_reading(path)
            except OSError as error:
                log.warning("apps can read %s: Landlock cannot be used here (%s)", path, error)
            argument = f"{prefix}/proc/self/fd/{copy}"
        hidden.append(argument)
    return hidden


def deny_reading(path: Path) -> None:
    """Deny this thread, and threads and processes that it starts, to read the file at `path`, for ever.

    Files that are made later in the folders on the way to `path` cannot be read either, and nothing moves out of them.
    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: ctypes._NamedFuncPointer, *arguments: object) -> int:
        if (result := function(*arguments)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(result)

    if call(libc.syscall, CREATE_RULESET, None, ctypes.c_size_t(0), GET_VERSION) < 2:
        raise OSError("its first version forbids to move files to other folders")
    handled = ctypes.c_uint64(READ_FILE | REFER)
    ruleset = call(libc.syscall, CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    try:
        for place in _all_but(path):
            opened = os.open(place, os.O_PATH)
            rule = PathBeneath(READ_FILE | REFER if os.path.isdir(place) else READ_FILE, opened)
            try:
                call(libc.syscall, ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), 0)
            finally:
                os.close(opened)
        call(libc.prctl, SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call(libc.syscall, RESTRICT_SELF, ruleset, 0)
        call(libc.prctl, SET_DUMPABLE, 0, 0, 0, 0)
    finally:
        os.close(ruleset)


def _all_but(path: Path) -> Iterator[str]:
    """Yield files and folders that together hold everything except `path`; links lead to one of them."""
    for folder, kept in zip(path.parents, (path, *path.parents), strict=False):
        for entry in os.scandir(folder):
            if entry.name != kept.name and not entry.is_symlink():
                yield entry.path
