"""docs/api.md and docs/commands.md are what `make docs` writes, and that is what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import sft_cloud.cli
import sft_edge.cli
from sft import errors

DOCS = Path(__file__).parents[2] / "docs"
_SPEC = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
assert _SPEC is not None
assert _SPEC.loader is not None
generate = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(generate)

COMMANDS = [("sft-edge", name) for name in generate.EDGE] + [("sft-cloud", name) for name in generate.CLOUD]
MAIN = {"sft-edge": sft_edge.cli.main, "sft-cloud": sft_cloud.cli.main}


@pytest.mark.parametrize("page", generate.PAGES)
def test_the_page_is_up_to_date(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == generate.PAGES[page](), "run make docs"


def test_every_command_is_there() -> None:
    assert list(generate.EDGE) == list(sft_edge.cli.COMMANDS)
    assert list(dict.fromkeys(name.split()[0] for name in generate.CLOUD)) == list(sft_cloud.cli.COMMANDS)


@pytest.mark.parametrize("group", ["token", "certs"])
def test_every_command_of_a_group_is_there(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_cloud.cli.main([group, "--help"]) == 0
    told = re.findall(r"^  (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert told
    assert told == [name.split()[1] for name in generate.CLOUD if name.startswith(f"{group} ")]


@pytest.mark.parametrize(("side", "command"), COMMANDS)
def test_the_options_are_those_of_the_command(side: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        MAIN[side]([*command.split(), "--help"])
    told = re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    section = page.partition(f"## `{side} {command}`\n")[2].partition("\n## ")[0]
    assert ["--config", *re.findall(r"^\| `(--[a-z0-9-]+)`", section, flags=re.MULTILINE)] == told


def test_every_error_is_on_the_page_with_its_exit_code() -> None:
    rows = re.findall(r"`(\w+Error)` \| (\d+) \|", (DOCS / "api.md").read_text(encoding="utf-8"))
    known = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Exception)]
    assert sorted(rows) == sorted((error.__name__, str(error.exit_code)) for error in known)
