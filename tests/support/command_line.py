"""The command line of copra-fl in the process of the test: run a command, list all commands."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

import click
import pytest
import typer.main

from copra_fl.cli import app, main


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


def root_command() -> click.Group:
    """Return the command line as click sees it."""
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    return command


def all_commands(command: click.Command, words: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    """Yield `command` and all commands below it, with the words that call them."""
    yield words, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from all_commands(child, [*words, name])
