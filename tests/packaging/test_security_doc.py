"""docs/security.md says what the code does."""

import re
import shlex
from pathlib import Path

import pytest

from sft.config import options_of
from sft_cloud.access_options import AccessOptions
from sft_cloud.certs_command import InitOptions
from sft_cloud.cli import ServeOptions
from sft_cloud.gate import RECHECK_SECONDS
from sft_cloud.token_commands import CreateOptions, ListOptions, RevokeOptions
from sft_cloud.tokens import LIMIT_NAMES
from sft_edge.options import TRAIN_OPTIONS

TEXT = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
COMMANDS = {
    "sft-cloud serve": (ServeOptions, AccessOptions),
    "sft-cloud certs init": (InitOptions,),
    "sft-cloud token create": (CreateOptions,),
    "sft-cloud token list": (ListOptions,),
    "sft-cloud token revoke": (RevokeOptions,),
    "sft-edge train": TRAIN_OPTIONS,
}


def flags_of(command):
    return {option.flag for concern in COMMANDS[command] for option in options_of(concern)}


LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if "sft-" in line
]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("sft-")])
def test_every_command_has_the_flags_it_is_shown_with(line):
    (command,) = (name for name in COMMANDS if line.startswith(name))
    shown = {word for word in shlex.split(line) if word.startswith("--")}
    assert shown
    assert shown <= flags_of(command)


def test_every_flag_that_is_named_exists():
    known = set().union(*map(flags_of, COMMANDS))
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) - known == set()


def test_every_limit_of_a_token_is_in_the_table():
    table = re.findall(r"^\| `(--[a-z-]+)` \|", TEXT, re.MULTILINE)
    assert table == ["--" + name.replace("_", "-") for name in (*LIMIT_NAMES, "sees_all")]


def test_the_time_that_an_idle_stream_has():
    assert "an idle stream within ten seconds" in " ".join(TEXT.split())
    assert RECHECK_SECONDS == 10
