"""The cloud as a child process, with scripted children: how it starts, fails and ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import List

import pytest

from sft.errors import LinkError, SessionLostError, UsageError
from sft_edge.systems.cloud_process import CloudProcess

TIMEOUT_SECONDS = 20.0

SERVES = """
import json, os, signal, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
def serve():
    address = "127.0.0.1:%d" % listener.getsockname()[1]
    print(json.dumps({"event": "serving", "address": address, "device": "cpu"}), flush=True)
"""
ENDS_WITH_STDIN = SERVES + "serve(); sys.stdin.read()"
PARENT = """
import sys
from sft_edge.systems.cloud_process import CloudProcess
with CloudProcess(command=[sys.executable, "-c", sys.argv[1]]) as cloud:
    print(cloud.address, flush=True)
    sys.stdin.read()
"""


def child(script: str) -> List[str]:
    return [sys.executable, "-c", script]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_hung_up(connection: socket.socket) -> None:
    """Returns when the process at the other end has ended."""
    connection.settimeout(TIMEOUT_SECONDS)
    with suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)))


def test_serves_inside_the_block_and_is_gone_behind_it() -> None:
    with CloudProcess(command=child(ENDS_WITH_STDIN)) as cloud:
        connection = connect(cloud.address)
        assert is_running(cloud.pid)
        assert os.getsid(cloud.pid) != os.getsid(0), "Ctrl-C on the terminal must not reach it"
    with connection:
        wait_until_hung_up(connection)
    assert not is_running(cloud.pid)
    cloud.close()  # once more does nothing


def test_a_child_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_edge.systems.cloud_process.STOP_TIMEOUT_SECONDS", 0.2)
    stubborn = SERVES + "signal.signal(signal.SIGTERM, signal.SIG_IGN); serve()\nwhile True: signal.pause()"
    with CloudProcess(command=child(stubborn)) as cloud:
        assert is_running(cloud.pid)
    assert not is_running(cloud.pid)


def test_an_early_death_is_told_in_the_childs_last_words(caplog: pytest.LogCaptureFixture) -> None:
    script = "import sys; sys.exit('first line\\n  second line\\n\\nsft-cloud: error: no such device: cuda:7\\n')"
    with caplog.at_level(logging.ERROR), pytest.raises(LinkError) as caught:
        CloudProcess(command=child(script))
    assert str(caught.value) == "the cloud process ended with exit code 1: sft-cloud: error: no such device: cuda:7"
    assert caplog.messages == ["sft-cloud: first line", "sft-cloud:   second line"]


def test_an_early_death_without_words() -> None:
    with pytest.raises(LinkError, match="was killed by signal 9 and left no message"):
        CloudProcess(command=child("import os; os.kill(os.getpid(), 9)"))


def test_a_child_that_does_not_start_serving_in_time() -> None:
    script = (
        "import sys; sys.stderr.write('still thinking'); sys.stderr.flush(); sys.stdout.write('{'); sys.stdin.read()"
    )
    with pytest.raises(LinkError, match=r"did not start serving within 1 s: still thinking"):
        CloudProcess(command=child(script), start_timeout_seconds=1)


@pytest.mark.parametrize("line", ["hello", "[]", '"serving"', "{}", '{"event": "leaving", "address": "a:1"}'])
def test_a_child_that_says_something_else(line: str) -> None:
    with pytest.raises(LinkError, match=r"should say where it serves within 0\.5 s, but says: "):
        CloudProcess(
            command=child(f"import sys; print({line!r}, flush=True); sys.stdin.read()"), start_timeout_seconds=0.5
        )


def test_a_line_before_the_childs_is_somebody_elses() -> None:
    """As of a sitecustomize."""
    with CloudProcess(command=child("print('three rows\\nand {}', flush=True)" + ENDS_WITH_STDIN)) as cloud:
        connect(cloud.address).close()


def test_a_death_in_the_middle_explains_the_lost_session() -> None:
    script = SERVES + "serve(); listener.accept(); sys.exit('Segmentation fault')"
    cloud = CloudProcess(command=child(script))
    lost = SessionLostError("the cloud was lost")

    def train() -> None:
        with connect(cloud.address) as connection:
            wait_until_hung_up(connection)
        raise lost

    with pytest.raises(LinkError, match="ended with exit code 1: Segmentation fault") as caught, cloud:
        train()
    assert caught.value.__cause__ is lost


def test_errors_of_a_child_that_lives_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_edge.systems.cloud_process.DEATH_NOTICE_SECONDS", 0.1)
    for error in (SessionLostError("no such session"), UsageError("another error"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, CloudProcess(command=child(ENDS_WITH_STDIN)):
            raise error
        assert caught.value is error


def test_without_the_clouds_part_there_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sft_cloud", None)
    with pytest.raises(UsageError, match=r"--server HOST:PORT .*pip install 'split-fine-tuning\[cloud\]'"):
        CloudProcess()


@pytest.mark.slow
def test_the_child_does_not_outlive_a_parent_that_is_killed() -> None:
    command = [*child(PARENT), ENDS_WITH_STDIN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True) as parent:
        assert parent.stdout is not None
        with connect(parent.stdout.readline().strip()) as connection:
            parent.send_signal(signal.SIGKILL)
            wait_until_hung_up(connection)
