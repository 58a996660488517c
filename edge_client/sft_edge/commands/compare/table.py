"""The comparison on a terminal: a column a run, in as many tables as its width asks for."""

from __future__ import annotations

import sys
from typing import IO, Iterator, List, Optional, Sequence, Tuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_edge.commands.compare.comparison import Cell, Comparison

_PLAIN_WIDTH = 120
_NAME_WIDTH = 28
_LABEL_WIDTH = 24
_BETWEEN = 3

_Line = Tuple[str, Sequence[Cell]]


def print_tables(comparison: Comparison, stream: Optional[IO[str]] = None) -> None:
    """Prints it on stdout unless told otherwise; plain text where no terminal is."""
    console = Console(file=stream or sys.stdout)
    if not console.is_terminal:
        console = Console(file=stream or sys.stdout, width=_PLAIN_WIDTH, color_system=None)
    plus_minus = "±" if console.encoding.lower().startswith("utf") else "+/-"
    sections = list(_sections(comparison))
    for block in _blocks(comparison, sections, console.width):
        console.print(_table(comparison, sections, block, plus_minus, console.is_terminal))
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _sections(comparison: Comparison) -> Iterator[Tuple[str, List[_Line]]]:
    for section in dict.fromkeys(row.section for row in comparison.rows):
        yield section, [(row.label, row.cells) for row in comparison.rows if row.section == section]
    if comparison.differing:
        options = sorted(comparison.differing.items(), key=lambda item: item[0] != "mode")
        yield "Options that differ", [(name, [Cell(value) for value in values]) for name, values in options]


def _blocks(comparison: Comparison, sections: Sequence[Tuple[str, Sequence[_Line]]], width: int) -> Iterator[List[int]]:
    """Which columns fit beside each other."""
    lines = [line for _, rows in sections for line in rows]
    left = width - min(max(len(label) for label, _ in lines), _LABEL_WIDTH) - _BETWEEN
    block: List[int] = []
    used = 0
    for index, column in enumerate(comparison.columns):
        longest = max(len(_plain(cells[index])) for _, cells in lines)
        needed = min(max(longest, len(column.name)), _NAME_WIDTH) + _BETWEEN
        if block and used + needed > left:
            yield block
            block, used = [], 0
        block.append(index)
        used += needed
    yield block


def _table(
    comparison: Comparison,
    sections: Sequence[Tuple[str, Sequence[_Line]]],
    block: Sequence[int],
    plus_minus: str,
    terminal: bool,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD if terminal else None, show_edge=False, padding=(0, 1 if terminal else 2, 0, 0))
    table.add_column("", max_width=_LABEL_WIDTH, overflow="fold")
    for index in block:
        column = comparison.columns[index]
        mark = " (baseline)" if index == comparison.baseline and len(comparison.columns) > 1 else ""
        table.add_column(Text(column.name + mark), justify="right", max_width=_NAME_WIDTH, overflow="fold")
    for section, lines in sections:
        table.add_row(Text(f"{section}", style="bold" if terminal else ""))
        for label, cells in lines:
            shown = [_text(cells[index], plus_minus) for index in block]
            table.add_row(Text(f"  {label}"), *shown)
        table.add_row("")
    return table


def _plain(cell: Cell) -> str:
    return f"{cell.text} ({cell.difference})" if cell.difference else cell.text


def _text(cell: Cell, plus_minus: str) -> Text:
    text = Text(cell.text.replace("±", plus_minus), style="bold" if cell.is_best else "")
    if cell.difference:
        text.append(f" ({cell.difference})", style="not bold dim")
    return text
