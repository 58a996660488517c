"""Every dependency has a reason in docs/dependencies.md, and nothing there is a dependency no more."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(__file__).parents[2]


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    names = {re.match(r"[\w.-]+", requirement).group() for requirement in requirements}
    return names - {project["name"]}


def explained():
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]*)`", row)}


def test_every_dependency_has_a_reason():
    assert declared() - explained() == set()


def test_no_reason_is_for_something_that_is_gone():
    assert explained() - declared() == set()
