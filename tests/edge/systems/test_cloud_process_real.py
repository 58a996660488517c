"""The cloud as a child process: the real `sft-cloud serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sft.errors import LinkError, SessionLostError
from sft_edge.systems.cloud_process import CloudProcess

pytestmark = pytest.mark.skipif(sys.version_info < (3, 10), reason="the cloud needs Python 3.10")

TIMEOUT_SECONDS = 60.0

PARENT = """
import sys
from sft_edge.systems.cloud_process import CloudProcess
with CloudProcess(sys.argv[1:]) as cloud:
    print(cloud.address, flush=True)
    sys.stdin.read()
"""


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), TIMEOUT_SECONDS)


def wait_until_hung_up(connection: socket.socket) -> None:
    """Returns when the process at the other end has ended; what it says before that is skipped."""
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


def flags(tmp_path: Path) -> list:
    return ["--device", "cpu", "--state-dir", str(tmp_path / "state")]


def test_it_serves_and_its_death_in_the_middle_is_explained(tmp_path: Path) -> None:
    cloud = CloudProcess(flags(tmp_path))

    def train() -> None:
        with connect(cloud.address) as connection:
            os.kill(cloud.pid, signal.SIGKILL)
            wait_until_hung_up(connection)
        raise SessionLostError("the cloud was lost")

    with pytest.raises(LinkError, match="the cloud process was killed by signal 9"), cloud:
        train()


def test_its_own_error_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"ended with exit code 2: .*--max-sessions must be from 1"):
        CloudProcess([*flags(tmp_path), "--max-sessions", "0"])


@pytest.mark.slow
def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, *flags(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True) as parent:
        assert parent.stdout is not None
        with connect(parent.stdout.readline().strip()) as connection:
            parent.send_signal(signal.SIGKILL)
            wait_until_hung_up(connection)
