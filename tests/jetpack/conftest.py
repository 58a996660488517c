"""An edge as a device with JetPack 5 has it, and a cloud on the newest stack: two environments on one machine.

`make test-jetpack` runs these tests with the edge's Python through run.py, which starts the cloud.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import List

import pytest
from support.interpreter import Interpreter

LIKE_A_DEVICE = Path(__file__).parent / "like_a_device"
FOUND = pytest.StashKey[List[str]]()


@pytest.fixture(scope="session")
def cloud() -> str:
    """Address of `sft-cloud serve` on the newest stack."""
    address = os.environ.get("SFT_TEST_CLOUD")
    if not address:
        pytest.skip(
            "SFT_TEST_CLOUD is not set: `make test-jetpack` sets it to the address of a cloud on the newest stack"
        )
    return address


@pytest.fixture(scope="session")
def newest(cloud: str) -> Interpreter:
    """The cloud's environment."""
    return Interpreter(os.environ["SFT_TEST_CLOUD_PYTHON"])


@pytest.fixture(scope="session")
def device(cloud: str) -> Interpreter:
    """This environment, under what a device has besides: no locale, and a torch without `torch.distributed`."""
    return Interpreter(sys.executable, LC_ALL="C", PYTHONPATH=str(LIKE_A_DEVICE))


@pytest.fixture(scope="session")
def found(pytestconfig: pytest.Config) -> List[str]:
    """Lines for the end of the run."""
    return pytestconfig.stash.setdefault(FOUND, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(FOUND, [])
    if lines:
        terminalreporter.section("JetPack 5's stack against the newest")
        for line in lines:
            terminalreporter.line(line)
