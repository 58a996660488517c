"""Calls of the library that may ask, download or run code are told not to, wherever they are.

By default `from_pretrained` asks on a terminal whether code beside a model may be run, and looks names up at the hub.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, Tuple

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("common", "edge_client", "cloud_server")
NAMES = ("from_pretrained", "from_config", "get_config_dict")
OFF = {"trust_remote_code": False, "local_files_only": True}
"""The hub is asked by `sft.tensors.hub` alone, for data."""

EXPORTS = "edge_client/sft_edge/commands/export/exported/"
"""Opens nothing but what has just been written."""


def calls(folder: str) -> Iterator[Tuple[str, str, Dict[str, ast.expr]]]:
    """File, name and named arguments of each call that may."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and isinstance(called, ast.Attribute) and called.attr in NAMES:
                given = {each.arg: each.value for each in node.keywords if each.arg is not None}
                yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", called.attr, given


@pytest.mark.parametrize("folder", [*OURS, "examples", "bench"])
def test_no_call_may_ask_or_run_code(folder: str) -> None:
    odd = []
    for place, name, given in calls(folder):
        needed = ["trust_remote_code"] if name == "from_config" or folder == "examples" else list(OFF)
        for argument in needed:
            value = given.get(argument)
            if not (isinstance(value, ast.Constant) and value.value is OFF[argument]) and not place.startswith(EXPORTS):
                odd.append(f"{place}: {name} without {argument}={OFF[argument]}")
    assert odd == []


def test_calls_are_found() -> None:
    assert [name for folder in OURS for _, name, _ in calls(folder)].count("from_pretrained") >= 3
    assert sum(1 for _ in calls("examples")) >= 6


def test_nothing_is_unpickled() -> None:
    """Neither `torch.load` nor pickle: both run what the file says."""
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "torch.load(" not in text, path
            assert "import pickle" not in text, path
