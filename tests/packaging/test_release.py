"""Changelog, version, citation and tag speak of one version, and `make release-check` says where they do not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "check_release.py"
_SPEC = importlib.util.spec_from_file_location("check_release", SCRIPT)
assert _SPEC is not None
assert _SPEC.loader is not None
check_release = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_release)

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-02-03\n\n- New.\n\n## [1.1.0]\n\n- Old.\n"
VERSION = '"""The version."""\n\n__version__ = "1.2.0"\n'
CITATION = "cff-version: 1.2.0\nversion: 1.2.0\ndate-released: 2026-02-03\n"
GOOD = {"changelog": CHANGELOG, "version_file": VERSION, "citation": CITATION, "tag": None}


def test_those_of_this_project_agree() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in check_release.FILES]
    assert check_release.problems(*texts) == []


@pytest.mark.parametrize("tag", [None, "v1.2.0"])
def test_what_agrees(tag: str | None) -> None:
    assert check_release.problems(**{**GOOD, "tag": tag}) == []


WAITING = CHANGELOG.replace("## [Unreleased]\n", "## [Unreleased]\n\n- Waits.\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"changelog": "# Changelog\n\n## [Unreleased]\n\n- New.\n"}, "CHANGELOG.md has no version"),
        (
            {"changelog": CHANGELOG.replace("1.2.0", "1.3.0")},
            "CHANGELOG.md has 1.3.0 as its newest version, common/sft/version.py has 1.2.0",
        ),
        ({"changelog": CHANGELOG.replace("## [Unreleased]\n\n", "")}, "CHANGELOG.md does not begin with [Unreleased]"),
        ({"version_file": "version = 1\n"}, "common/sft/version.py has no line `__version__ = ...`"),
        ({"citation": "cff-version: 1.2.0\n"}, "CITATION.cff has version none, common/sft/version.py has 1.2.0"),
        ({"citation": "version: 1.1.0\n"}, "CITATION.cff has version 1.1.0, common/sft/version.py has 1.2.0"),
        ({"tag": "v1.1.0"}, "the tag is v1.1.0, and should be v1.2.0"),
        (
            {"changelog": CHANGELOG.replace("1.1.0", "1.3.0")},
            "CHANGELOG.md: 1.3.0 stands below 1.2.0",
        ),
        ({"changelog": CHANGELOG.replace("1.1.0", "1.2.0")}, "CHANGELOG.md: 1.2.0 stands below 1.2.0"),
        (
            {"tag": "v1.2.0", "changelog": CHANGELOG.replace("02-03", "99-99")},
            "CHANGELOG.md: [1.2.0] has no date: ` - YYYY-MM-DD`",
        ),
        (
            {"tag": "v1.2.0", "changelog": CHANGELOG.replace("02-03", "02-04")},
            "CITATION.cff was released 2026-02-03, CHANGELOG.md says 2026-02-04",
        ),
        (
            {"tag": "v1.2.0", "citation": "version: 1.2.0\n"},
            "CITATION.cff was released on no date, CHANGELOG.md says 2026-02-03",
        ),
        ({"tag": "v1.2.0", "changelog": CHANGELOG.replace("- New.\n\n", "")}, "CHANGELOG.md: [1.2.0] says nothing"),
        ({"tag": "1.2.0"}, "the tag is 1.2.0, and should be v1.2.0"),
        (
            {"tag": "v1.2.0", "changelog": CHANGELOG.replace(" - 2026-02-03", "")},
            "CHANGELOG.md: [1.2.0] has no date: ` - YYYY-MM-DD`",
        ),
        (
            {"tag": "v1.2.0", "changelog": WAITING},
            "CHANGELOG.md: what is under [Unreleased] belongs to the version that is tagged",
        ),
    ],
)
def test_what_does_not_agree(changes: dict[str, str], said: str) -> None:
    assert check_release.problems(**{**GOOD, **changes}) == [said]


def test_a_version_of_another_form() -> None:
    wrong = check_release.problems(CHANGELOG, VERSION.replace("1.2.0", "1.2"), CITATION)
    assert wrong[0] == "common/sft/version.py: '1.2' is not of the form X.Y.Z"


def test_what_waits_is_no_matter_before_the_tag() -> None:
    assert check_release.problems(**{**GOOD, "changelog": WAITING}) == []


def test_the_command_ends_with_1_where_something_does_not_agree() -> None:
    good = subprocess.run([sys.executable, str(SCRIPT), "--tag", ""], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout, good.stderr) == (0, "they agree\n", "")
    bad = subprocess.run([sys.executable, str(SCRIPT), "--tag", "v0.0.0"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.startswith("the tag is v0.0.0, and should be v")


def citation() -> dict[str, Any]:
    content = yaml.load((ROOT / "CITATION.cff").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert isinstance(content, dict)
    return content


def test_the_citation_has_what_its_format_requires() -> None:
    """Of 1.2.0; `cffconvert --validate` compares with all of its schema."""
    found = citation()
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= found.keys()
    assert found["type"] == "software"
    for work in (found, found["preferred-citation"]):
        assert work["title"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})


def test_the_citation_is_of_the_paper_and_the_license_that_the_readme_names() -> None:
    found, readme = citation(), " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paper = found["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert f"*{paper['title']}*" in readme
    names = [f"{author['given-names'][0]}. {author['family-names']}" for author in paper["authors"]]
    assert f"{', '.join(names)}: *" in readme
    assert re.fullmatch(r"10\.\d{4,}/\S+", paper["doi"])
    assert f"[{found['license']}](LICENSE)" in readme
