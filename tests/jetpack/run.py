"""Runs pytest beside a cloud of another environment: `python run.py PYTHON [pytest's arguments]`."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest

from sft_edge.systems.cloud_process import CloudProcess


def main() -> int:
    """Tells the tests the cloud's address and interpreter by the environment. Returns pytest's exit code."""
    python, *arguments = sys.argv[1:]
    serve = [python, "-m", "sft_cloud", "serve", "--host", "127.0.0.1", "--port", "0", "--exit-with-stdin"]
    serve += ["--device", "cpu", "--threads", "1", "--opens-per-minute", "100000", "--state-dir"]
    with tempfile.TemporaryDirectory() as state, CloudProcess(command=[*serve, state]) as cloud:
        os.environ.update(SFT_TEST_CLOUD=cloud.address, SFT_TEST_CLOUD_PYTHON=python)
        return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
