"""One HTML file that needs nothing from elsewhere, and runs nothing: a policy inside it says so to the browser, too."""

from __future__ import annotations

from html import escape
from typing import Iterable, Iterator, Sequence

from sft.version import __version__
from sft_edge.commands.compare import svg
from sft_edge.commands.compare.charts import charts_of, picture
from sft_edge.commands.compare.comparison import Cell, Comparison

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = f"""
:root{{color-scheme:light dark;--ink:#222;--paper:#fff;--pale:#ddd;--soft:#666;--best:#eef6ee}}
@media (prefers-color-scheme: dark){{:root{{
--ink:#e4e4e4;--paper:#1b1d21;--pale:#3a3d44;--soft:#a0a0a0;--best:#22332a}}}}
body{{margin:2rem auto;max-width:1500px;padding:0 1.5rem;background:var(--paper);color:var(--ink);
font:15px/1.45 {svg.FONT}}}
h1{{font-size:1.5rem;margin-bottom:.2rem}}h2{{font-size:1.1rem;margin-top:2rem}}
.soft{{color:var(--soft)}}.note{{border-left:3px solid #D55E00;padding:.1rem .7rem;margin:.4rem 0}}
.wide{{overflow-x:auto}}table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
th,td{{padding:.28rem .9rem .28rem 0;border-bottom:1px solid var(--pale);text-align:right;white-space:nowrap;
vertical-align:top}}
th:first-child,td:first-child{{text-align:left;position:sticky;left:0;background:var(--paper);padding-right:1.4rem}}
thead th{{border-bottom:2px solid var(--soft);white-space:normal;overflow-wrap:anywhere;min-width:7rem;
max-width:16rem;vertical-align:bottom}}
tr.section th{{text-align:left;padding-top:1.1rem;color:var(--soft);font-weight:600}}
td.best{{font-weight:700;background:var(--best)}}td.text{{white-space:normal;overflow-wrap:anywhere;max-width:16rem}}
small{{display:block;color:var(--soft);font-weight:400}}tbody th{{font-weight:400}}
.charts{{display:flex;flex-wrap:wrap;gap:1rem}}.charts svg{{flex:1 1 480px;max-width:720px;height:auto}}
details{{margin-top:1.5rem}}summary{{cursor:pointer}}thead svg{{vertical-align:middle}}
"""


def page_of(comparison: Comparison) -> str:
    """The whole file."""
    names = ", ".join(column.name for column in comparison.columns)
    baseline, several = comparison.columns[comparison.baseline].name, len(comparison.columns) > 1
    title = f"{len(comparison.columns)} runs side by side" if several else "A run"
    against = f"Differences are to {escape(baseline)}; the best value of finished runs is marked. " if several else ""
    charts = "".join(picture([chart], style=False) for chart in charts_of(comparison))
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>sft-edge compare: {escape(names[:200])}</title>\n",
            f"<style>{_STYLE}{svg.STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
            f'<p class="soft">{against}Points of charts say more where a pointer rests on them.</p>\n',
            *(f'<p class="note">{escape(note)}</p>\n' for note in comparison.notes),
            f'<div class="charts">{charts}</div>\n',
            *_differing(comparison),
            f'<h2>Figures</h2>\n<div class="wide"><table>\n{_head(comparison)}<tbody>\n',
            *_figures(comparison),
            "</tbody></table></div>\n",
            *_shared(comparison),
            *_directories(comparison),
            f'<p class="soft">split-fine-tuning {escape(__version__)}</p>\n</body>\n</html>\n',
        ]
    )


def _head(comparison: Comparison) -> str:
    cells = []
    for index, column in enumerate(comparison.columns):
        mark = svg.mark_of(index)
        swatch = svg.element(
            "svg",
            [svg.polyline([(0.0, 6.0), (26.0, 6.0)], mark), svg.marker(13, 6, mark)],
            width=26,
            height=12,
            viewBox="0 0 26 12",
            aria_hidden="true",
        )
        base = "<small>baseline</small>" if index == comparison.baseline and len(comparison.columns) > 1 else ""
        cells.append(f'<th scope="col">{swatch}<br>{escape(column.name)}{base}</th>')
    return f"<thead><tr><th></th>{''.join(cells)}</tr></thead>\n"


def _figures(comparison: Comparison) -> Iterator[str]:
    section = ""
    for row in comparison.rows:
        if row.section != section:
            section = row.section
            span = len(comparison.columns) + 1
            yield f'<tr class="section"><th colspan="{span}" scope="rowgroup">{escape(section)}</th></tr>\n'
        yield _line(row.label, row.cells, "text" if section == "Run" else "")


def _line(label: str, cells: Iterable[Cell], kind: str = "") -> str:
    return f'<tr><th scope="row">{escape(label)}</th>{"".join(_cell(cell, kind) for cell in cells)}</tr>\n'


def _cell(cell: Cell, kind: str) -> str:
    classes = " ".join(filter(None, [kind, "best" if cell.is_best else ""]))
    beside = f"<small>{escape(cell.difference)}</small>" if cell.difference else ""
    return f"<td{f' class={chr(34)}{classes}{chr(34)}' if classes else ''}>{escape(cell.text)}{beside}</td>"


def _differing(comparison: Comparison) -> Iterator[str]:
    if not comparison.differing:
        return
    yield f'<h2>Options that differ</h2>\n<div class="wide"><table>\n{_head(comparison)}<tbody>\n'
    for name, values in comparison.differing.items():
        yield _line(name, map(Cell, values), "text")
    yield "</tbody></table></div>\n"


def _shared(comparison: Comparison) -> Iterator[str]:
    if comparison.shared:
        summary = f"{len(comparison.shared)} options that are the same"
        yield from _folded(summary, [[name, value] for name, value in comparison.shared.items()])


def _directories(comparison: Comparison) -> Iterator[str]:
    rows = [[column.name, str(run.directory)[:400]] for column in comparison.columns for run in column.runs]
    yield from _folded("Where the runs are", rows)


def _folded(summary: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"<details><summary>{escape(summary)}</summary>\n<table><tbody>\n"
    for name, value in rows:
        yield _line(name, [Cell(value)], "text")
    yield "</tbody></table></details>\n"
