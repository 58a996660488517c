"""`sft-edge compare`: reads the runs, holds them against each other, and writes what was asked for."""

from __future__ import annotations

import sys
from pathlib import Path

from sft.errors import StorageError
from sft.files.whole import whole_file
from sft_edge.commands.compare.charts import charts_of, picture
from sft_edge.commands.compare.columns import columns_of
from sft_edge.commands.compare.comparison import as_json, compared
from sft_edge.commands.compare.page import page_of
from sft_edge.commands.compare.table import print_tables
from sft_edge.files import json_text
from sft_edge.options import CompareOptions


def compare(options: CompareOptions) -> None:
    """Prints the tables, or JSON, and writes the files. Raises UsageError, CheckpointError and StorageError."""
    comparison = compared(*columns_of(options.runs, options.baseline, options.group_seeds))
    if options.svg is not None:
        _write("--svg", options.svg, picture(charts_of(comparison)) + "\n")
    if options.html is not None:
        _write("--html", options.html, page_of(comparison))
    if options.json:
        sys.stdout.write(json_text(as_json(comparison)))
        return
    print_tables(comparison)
    for path in filter(None, (options.svg, options.html)):
        sys.stdout.write(f"wrote {path}\n")


def _write(option: str, path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content.encode("utf-8"))
    except OSError as error:
        raise StorageError(f"cannot write {option} {path}: {error.strerror}; name another place") from error
