"""`DataTable`: the one form of every table, for reports, terminals, documents and files."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

#: a column of text on a terminal is at least so wide, or as its longest cell
MIN_TEXT_COLUMN = 18
#: more than any table's width
MAX_WIDTH = 10_000
#: width of text in Markdown
MARKDOWN_COLUMNS = 120
#: a cell without a value
NO_VALUE = "–"
#: a cell that counts as a number when a column is aligned
NUMBER = re.compile(rf"[+−-]?\.?\d[\d.,]*(e[+−-]?\d+)?[%/]?\d*( .*)?|none|{NO_VALUE}|")
#: a cell with a mean and its interval
INTERVAL = re.compile(r"([^ ]+) \[([^,]+), ([^\]]+)\]")


@dataclass(frozen=True)
class DataTable:
    """A table of text; the first cell of a row names it.

    Attributes:
        caption: explains the columns.
        dividers: numbers of the rows, from 1, that are followed by a line on a terminal.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    title: str = ""
    dividers: Collection[int] = ()

    @property
    def numeric(self) -> list[bool]:
        """Return for each column True if all its cells are numbers; these columns are right-aligned."""
        return [
            bool(self.rows) and all(NUMBER.fullmatch(row[index]) for row in self.rows)
            for index in range(len(self.header))
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for a terminal: a table too wide goes on below, with its first column; no number is cut."""
        start, unlimited = 1, options.update(max_width=MAX_WIDTH)
        while True:
            end = len(self.header)
            while end > start + 1 and self._width(console, unlimited, range(start, end)) > options.max_width:
                end -= 1
            yield self._columns(range(start, end))._rich()
            if end == len(self.header):
                break
            start = end
        if self.caption:
            yield Text(self.caption, style="dim italic")

    def _columns(self, chosen: Sequence[int]) -> DataTable:
        """Return the first column and those `chosen`."""
        header, *rows = [[line[0], *(line[index] for index in chosen)] for line in (self.header, *self.rows)]
        return replace(self, header=header, rows=rows)

    def _width(self, console: Console, unlimited: ConsoleOptions, chosen: Sequence[int]) -> int:
        """Return the least width of the table of `_columns`."""
        return console.measure(self._columns(chosen)._rich(), options=unlimited).minimum

    def _rich(self) -> Table:
        """Return the table alone; headings are wrapped so that a column is as narrow as its cells."""
        table = Table(
            title=Text(self.title, style="table.title") if self.title else None,
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
            title_justify="left",
        )
        for index, (heading, numeric) in enumerate(zip(self.header, self.numeric, strict=True)):
            width = max(map(len, (*heading.split(), *(row[index] for row in self.rows))), default=1)
            table.add_column(
                Text("\n".join(textwrap.wrap(heading, width))),
                justify="right" if numeric else "left",
                vertical="bottom",
                no_wrap=numeric,
                overflow="fold",
                min_width=width if numeric else min(width, MIN_TEXT_COLUMN),
            )
        for number, row in enumerate(self.rows, start=1):
            table.add_row(*map(Text, row), end_section=number in self.dividers)
        return table

    def markdown(self) -> str:
        """Return the table as Markdown: title, table, caption."""
        cells = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        lines = [self.header, ["---"] * len(self.header), *cells]
        title = f"## {self.title}\n\n" if self.title else ""
        caption = f"\n{textwrap.fill(self.caption, MARKDOWN_COLUMNS, break_on_hyphens=False)}\n" if self.caption else ""
        return title + "".join(f"| {' | '.join(line)} |\n" for line in lines) + caption

    def csv(self) -> str:
        """Return header and rows as CSV; intervals have columns of their own, ``NAME low`` and ``NAME high``."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        split = [any(INTERVAL.fullmatch(row[index]) for row in self.rows) for index in range(len(self.header))]
        ends = ("", " low", " high")
        writer.writerow(
            f"{name}{end}"
            for name, is_split in zip(self.header, split, strict=True)
            for end in ends[: 3 if is_split else 1]
        )
        for row in self.rows:
            cells: list[str] = []
            for cell, is_split in zip(row, split, strict=True):
                match = INTERVAL.fullmatch(cell) if is_split else None
                cells += match.groups() if match else [cell, "", ""] if is_split else [cell]
            writer.writerow(cell.replace("−", "-").replace(NO_VALUE, "") for cell in cells)
        return lines.getvalue()

    def latex(self) -> str:
        """Return a LaTeX table environment; it needs the package booktabs."""
        import pandas as pd  # slow to import

        frame = pd.DataFrame(list(map(list, self.rows)), columns=list(self.header))
        columns = "".join("r" if numeric else "l" for numeric in self.numeric)
        text = frame.to_latex(
            index=False, escape=True, column_format=columns, caption=_latex_text(self.caption) or None
        )
        return text.replace("−", "$-$").replace("–", "--")


def _latex_text(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def file_stem(name: str) -> str:
    """Return a name for files: ``accuracy-by-round`` for ``Accuracy by round``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def with_minus(value: float, spec: str) -> str:
    """Return `value` in the Python format `spec`, with a true minus sign (U+2212).

    >>> with_minus(-0.5, ".1f")
    '−0.5'
    """
    return f"{value:{spec}}".replace("-", "−")
