"""`make release-check`: whether the changelog, the version, the citation and the tag speak of one version."""

from __future__ import annotations

import argparse
import re
import sys
from datetime import date
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(changelog: str, version_file: str, citation: str, tag: str | None = None) -> list[str]:
    """What does not agree, a line each. The first three are texts of files; without a tag there is none to agree."""
    found = re.search(r'^__version__ = "(.*)"$', version_file, flags=re.MULTILINE)
    if found is None:
        return ["common/sft/version.py has no line `__version__ = ...`"]
    version, wrong = found[1], []
    if not re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", version):
        wrong.append(f"common/sft/version.py: {version!r} is not of the form X.Y.Z")
    headings = re.findall(r"^## \[(.*?)\](.*)$", changelog, flags=re.MULTILINE)
    if not headings or headings[0][0] != "Unreleased":
        wrong.append("CHANGELOG.md does not begin with [Unreleased]")
    released = [heading for heading in headings if heading[0] != "Unreleased"]
    if not released:
        wrong.append("CHANGELOG.md has no version")
    elif released[0][0] != version:
        wrong.append(f"CHANGELOG.md has {released[0][0]} as its newest version, common/sft/version.py has {version}")
    wrong += _problems_of_order([heading[0] for heading in released])
    cited = re.search(r'^version: "?([^"\n]*)', citation, flags=re.MULTILINE)
    if cited is None or cited[1] != version:
        wrong.append(f"CITATION.cff has version {cited[1] if cited else 'none'}, common/sft/version.py has {version}")
    if tag is not None:
        if tag != f"v{version}":
            wrong.append(f"the tag is {tag}, and should be v{version}")
        if released:
            wrong += _problems_of_date(*released[0], citation)
            if not re.search(rf"^## \[{re.escape(released[0][0])}\].*\n(?:\s*\n)*(?!## )\S", changelog, re.MULTILINE):
                wrong.append(f"CHANGELOG.md: [{released[0][0]}] says nothing")
        waiting = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, flags=re.MULTILINE | re.DOTALL)
        if waiting is not None and waiting[1].strip():
            wrong.append("CHANGELOG.md: what is under [Unreleased] belongs to the version that is tagged")
    return wrong


def _problems_of_date(version: str, heading: str, citation: str) -> list[str]:
    cited = re.search(r'^date-released: "?([^"\n]*)', citation, flags=re.MULTILINE)
    try:
        day = str(date.fromisoformat(heading[3:] if heading.startswith(" - ") else ""))
    except ValueError:
        return [f"CHANGELOG.md: [{version}] has no date: ` - YYYY-MM-DD`"]
    if cited is None or cited[1] != day:
        return [f"CITATION.cff was released {cited[1] if cited else 'on no date'}, CHANGELOG.md says {day}"]
    return []


def _problems_of_order(released: list[str]) -> list[str]:
    numbers = [tuple(map(int, version.split("."))) for version in released if re.fullmatch(r"\d+\.\d+\.\d+", version)]
    return [
        f"CHANGELOG.md: {'.'.join(map(str, older))} stands below {'.'.join(map(str, newer))}"
        for newer, older in pairwise(numbers)
        if older >= newer
    ]


def main() -> int:
    """The exit code: 1 where something does not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the tag of the release; without it, or empty, there is none yet")
    tag = parser.parse_args().tag or None
    try:
        wrong = problems(*((ROOT / name).read_text(encoding="utf-8") for name in FILES), tag)
    except OSError as error:
        wrong = [f"{error.filename}: {error.strerror}"]
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    if not wrong:
        sys.stdout.write(f"they agree{'' if tag is None else f', and so does {tag}'}\n")
    return 1 if wrong else 0


FILES = ("CHANGELOG.md", "common/sft/version.py", "CITATION.cff")

if __name__ == "__main__":
    sys.exit(main())
