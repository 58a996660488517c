"""The README says what the code does."""

import re
from pathlib import Path

import pytest

from sft.cli.options import options_of
from sft_edge.options.train import TRAIN_OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def options_table():
    """The table that the README must hold, word for word."""
    lines = ["| option | default | what it is |", "|---|---|---|"]
    for concern in TRAIN_OPTIONS:
        lines.append(f"| **{concern.__doc__.rstrip('.')}** | | |")
        for option in options_of(concern):
            choices = f" {' '.join(f'`{choice}`' for choice in option.choices)}:" if option.choices else ""
            lines.append(f"| `{option.flag}` | {default(option)} |{choices} {option.doc} |")
    return "\n".join(lines)


def default(option):
    if option.required:
        return "required"
    if option.default in (None, {}, []):
        return ""
    return f"`{str(option.default).lower() if option.type is bool else option.default}`"


def test_the_options_table_is_that_of_the_code():
    assert options_table() in README


def test_every_file_that_is_named_exists():
    for name in set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README)) | set(re.findall(r"\bbench/\w+\.py", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z0-9-]+)", README))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
