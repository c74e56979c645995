"""The exit codes of all commands."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of all commands. Every error is one message on standard error, "copra-fl: ..."."""

    #: the command did its work
    DONE = 0
    #: the work failed: a run or node stopped, a download failed, Docker reported an error, a folder is not writable
    FAILED = 1
    #: the command line, the configuration or the given folder is wrong; nothing was started
    USAGE = 2
    #: stopped with Ctrl-C (typer's code for it) or SIGTERM; finished rounds are kept
    INTERRUPTED = 130
