"""Plain English in everything that users and developers read: help texts, messages, docstrings, comments."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.support.command_line import all_commands, root_command

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("copra_fl", "clients", "server") for path in (ROOT / folder).rglob("*.py"))

#: phrases that are no plain English, and what to write instead
BANNED = {
    r"be had": "is available, can be downloaded",
    r"had better": "should",
    r"made plain": "resolved, shown",
    r"(is|are|be|was|were|been) (told|said)|(told|said) of": "name the value that is passed, or the message",
    r"there (is|are) none|has none": "name the missing thing: without X, X is missing",
    r"as ever": "as before",
    r"comes? along|carried": "built-in, installed",
    r"besides|anyhow": "also, too",
    r"for people": "for the user",
    r"go(es)? on with|gone on": "continue",
    r"throws? away|thrown away|throws? it away": "delete",
    r"turned (away|out)": "rejected",
    r"looked at|looks? into": "inspect, measure",
    r"wanted": "requested, required",
    r"(lets?|letting) in": "accept, register",
    r"of (one's|its|his|their) own accord": "by itself",
    r"what there is|what it takes|what is what": "name the thing",
}
PATTERN = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
#: openings of a docstring that ask a riddle; a summary is an imperative ("Return ...") or a noun phrase
RIDDLE = re.compile(r"(What|How|Whether|Who|Whose|Whichever|Whatever|Those|Of)\b")


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string and every block of comments, in one line each; ``{}`` in place of values."""
    nodes = list(ast.walk(ast.parse(source)))
    f_strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts_of_f_strings = {id(part) for f_string in f_strings for part in f_string.values}
    for f_string in f_strings:
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in f_string.values]
        yield f_string.lineno, " ".join("".join(map(str, parts)).split())
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts_of_f_strings:
            yield node.lineno, " ".join(node.value.split())
    block: list[str] = []
    previous = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != previous + 1 and block:
                yield previous, " ".join(block)
                block = []
            block.append(token.string.lstrip("#: "))
            previous = token.start[0]
    yield previous, " ".join(block)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring


def test_no_banned_phrase() -> None:
    matches = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r} in: {text[max(0, match.start() - 40) : match.end() + 40]}"
        for path in FILES
        for line, text in texts(path.read_text(encoding="utf-8"))
        for match in PATTERN.finditer(text)
    ]
    assert not matches, "\n".join(matches)


def test_no_docstring_opens_with_a_riddle() -> None:
    riddles = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in FILES
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if RIDDLE.match(text)
    ]
    assert not riddles, "\n".join(riddles)


@pytest.mark.parametrize(
    ("name", "command"), [(" ".join(words), command) for words, command in all_commands(root_command(), ["copra-fl"])]
)
def test_every_command_and_option_has_a_help_text(name: str, command: click.Command) -> None:
    """A command's text begins with a capital; both are sentences or noun phrases with a full stop."""
    summary = (command.help or "").split("\n\n")[0].strip()
    assert summary[:1].isupper() and summary.endswith("."), f"{name}: {summary!r}"
    for parameter in command.params:
        if parameter.name != "help":
            text = getattr(parameter, "help", None) or ""
            assert text.rstrip().endswith("."), f"{name} {parameter.opts[0]}: {text!r}"


def test_the_checks_find_what_they_are_for() -> None:
    source = '"""What of it."""\nx = (f"asset {1} cannot be "\n     "had")\n# it comes\n# along\n'
    assert [match[0] for _, text in texts(source) for match in PATTERN.finditer(text)] == ["be had", "comes along"]
    assert [line for line, text in docstrings(source) if RIDDLE.match(text)] == [1]
