"""Two network namespaces joined by a veth pair whose ends `tc tbf` holds to a rate: edge and cloud on one host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from sft.errors import UsageError

CLOUD_HOST = "10.77.0.1"
EDGE_HOST = "10.77.0.2"
"""Addresses inside the namespaces, which nothing outside them sees."""

_DEVICE = "link0"
_TCP_RATE = Path(__file__).with_name("tcp_rate.py")
_MEASURE_SECONDS = 2


class ShapedLink:
    """A context manager; on every way out the namespaces, and with them the link, are gone."""

    def __init__(self, rate: str) -> None:
        """`rate` is in tc's units, such as "10mbit"; it holds in both directions."""
        self.rate = rate
        self._cloud = f"sft-cloud-{os.getpid()}"
        self._edge = f"sft-edge-{os.getpid()}"
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> ShapedLink:
        """Raises UsageError where the system does not let namespaces be made, or tc refuses the rate."""
        if os.geteuid() != 0:
            raise UsageError("network namespaces need root: sudo make emulate")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise UsageError(f"{tool!r} is not installed; it is part of iproute2")
        try:
            self._make()
        except BaseException:  # Ctrl-C too
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def on_cloud(self, command: list[str]) -> list[str]:
        """The command that runs `command` on the cloud's end."""
        return ["ip", "netns", "exec", self._cloud, *command]

    def on_edge(self, command: list[str]) -> list[str]:
        """The command that runs `command` on the edge's end."""
        return ["ip", "netns", "exec", self._edge, *command]

    def measure(self) -> tuple[float, float]:
        """Bits per second of one TCP connection: edge to cloud, and cloud to edge. Takes about four seconds."""
        up = _tcp_rate(self.on_edge, self.on_cloud, CLOUD_HOST)
        return up, _tcp_rate(self.on_cloud, self.on_edge, EDGE_HOST)

    def _make(self) -> None:
        for name in (self._cloud, self._edge):
            _run("ip", "netns", "add", name)
            self._exits.callback(_run, "ip", "netns", "delete", name)
        ends = ("netns", self._edge, "type", "veth", "peer", "name", _DEVICE, "netns", self._cloud)
        _run("ip", "link", "add", _DEVICE, *ends)
        for name, host in ((self._cloud, CLOUD_HOST), (self._edge, EDGE_HOST)):
            _run("ip", "-netns", name, "address", "add", f"{host}/30", "dev", _DEVICE)
            for device in ("lo", _DEVICE):
                _run("ip", "-netns", name, "link", "set", device, "up")
            # A bucket smaller than one step's activations, or they would cross at once; 100 ms of traffic may wait.
            shape = ("root", "tbf", "rate", self.rate, "burst", "8kb", "latency", "100ms")
            _run("tc", "-netns", name, "qdisc", "add", "dev", _DEVICE, *shape)

    def _close(self) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave namespaces behind
        try:
            self._exits.close()
        finally:
            signal.signal(signal.SIGINT, before)


_Side = Callable[[list[str]], list[str]]


def _tcp_rate(sender: _Side, receiver: _Side, host: str) -> float:
    """Bits per second from one end to the other, whose address is `host`."""
    script = [sys.executable, str(_TCP_RATE)]
    with subprocess.Popen(receiver([*script, "receive", host]), stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None
        port = receiving.stdout.readline().strip()
        subprocess.run(sender([*script, "send", host, port, str(_MEASURE_SECONDS)]), check=True)
        return float(receiving.stdout.readline())


def _run(*command: str) -> None:
    """Raises UsageError with what the command says when it fails."""
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise UsageError(f"{' '.join(command)}: {reason[0] if reason else f'exit code {done.returncode}'}")
