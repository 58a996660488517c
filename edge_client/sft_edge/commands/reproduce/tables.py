"""Tables for a terminal and for Markdown, of the same cells."""

from __future__ import annotations

import sys
from typing import List, NamedTuple, Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


class Table(NamedTuple):
    """Text in rows; all columns but the first are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: List[List[str]]


def print_table(table: Table) -> None:
    """On stdout: plain text as wide as it is where no terminal is."""
    console = Console()
    if not console.is_terminal:
        widths = (max(len(row[index]) for row in [table.columns, *table.rows]) for index in range(len(table.columns)))
        console = Console(file=sys.stdout, width=max(sum(widths) + 3 * len(table.columns), 80), color_system=None)
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE if console.is_terminal else None)
    for index, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def markdown(table: Table) -> str:
    """The table below its title."""
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"## {table.title}\n\n{body}\n"
