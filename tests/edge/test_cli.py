"""The command `sft-edge`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
from support.jobs import error_line

from sft.version import __version__
from sft_edge.cli import COMMANDS, main

AN_OPTION = {
    "train": "--seed",
    "attach": "--output-dir",
    "evaluate": "--output-file",
    "predict": "--json-lines",
    "compare": "--group-seeds",
    "export": "--factored",
    "verify": "--tolerance",
    "doctor": "--idle",
    "env": "--json",
    "demo": "--seed",
    "plan": "--min-accuracy",
    "reproduce": "--split-ranks",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: sft-edge {command} [options]")
    assert (COMMANDS[command].__doc__ or "nothing") in told
    assert AN_OPTION[command] in told


def test_the_overview_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in told
        assert (command.__doc__ or "nothing") in told
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sft-edge {__version__}\n"


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn"]) == 2
    assert error_line(capsys.readouterr().err).startswith("there is no command 'learn'; the commands are train,")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_that_is_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--colour", "red"]) == 2
    said = error_line(capsys.readouterr().err)
    assert said == f"unrecognized arguments: --colour red; see sft-edge {command} --help"


def test_help_does_without_torch(tmp_path: Path) -> None:
    """In a process where it cannot be imported: it takes seconds."""
    for name in ("torch", "transformers", "grpc"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "sft_edge", command, "--help"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_grpc_prepares_for_no_fork_unless_it_was_told_to(before: Optional[str], after: str) -> None:
    name = "GRPC_ENABLE_FORK_SUPPORT"
    environment = {**os.environ, **({name: before} if before else {})}
    if before is None:
        environment.pop(name, None)
    code = f"import os, sft_edge; print(os.environ[{name!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == after
