"""`sft-cloud env`: what `sft-edge env` tells, of the server's machine."""

from __future__ import annotations

import json

import pytest
from support.jobs import error_line

from sft.cli.environment import as_text, environment
from sft_cloud.cli import main


def test_it_tells_what_the_edge_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == environment()
    assert main(["env"]) == 0
    assert capsys.readouterr().out == as_text(environment())


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json", "perhaps"]) == 2
    assert error_line(capsys.readouterr().err) == "--json: 'perhaps' is neither true nor false"
