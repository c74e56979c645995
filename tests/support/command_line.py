"""Run a command of copra-fl in the process of the test, as the console script does."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

import pytest

from copra_fl.cli import main


class Output(NamedTuple):
    """Standard output and standard error of a command."""

    out: str
    err: str

    @property
    def message(self) -> str:
        """Standard error in one line, so that a message is found wherever it was wrapped."""
        return " ".join(self.err.split())


def run_command(*arguments: object, code: int = 0, stdin: str = "") -> Output:
    """Run ``copra-fl ARGUMENTS``; fail the test unless it exits with `code`."""
    out, err = io.StringIO(), io.StringIO()
    words = list(map(str, arguments))
    with (
        mock.patch("sys.argv", ["copra-fl", *words]),
        mock.patch("sys.stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as exit_,
    ):
        main()
    output = Output(out.getvalue(), err.getvalue())
    assert exit_.value.code == code, f"exit code {exit_.value.code}\n{output.out}\n{output.err}"
    assert "Traceback" not in output.err
    return output
