"""A cloud of the edge's own: `sft-cloud serve` as a child process on a loopback port, ended with the run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import List, Optional, Sequence, Type

from sft.cli.child import python_command
from sft.errors import LinkError, ServerUnavailableError, SessionLostError, UsageError
from sft.files.temporary import TemporaryDirectory
from sft.printable import printable

START_TIMEOUT_SECONDS = 180.0
"""Importing torch and transformers takes a small machine a while."""

STOP_TIMEOUT_SECONDS = 10.0
"""How long the child may take to end when asked to, before it is killed."""

DEATH_NOTICE_SECONDS = 1.0
"""How much later than the link's failure the system may report the child's death."""

_STATE_PREFIX = "sft-cloud-own-"

_LAST_LINES = 20
_LAST_BYTES = 16384

logger = logging.getLogger(__name__)


class CloudProcess:
    """Serving when constructed; a context manager that ends the child.

    The child also ends when its standard input does, so it does not outlive an edge that is killed. It runs in a
    terminal session of its own: Ctrl-C reaches the edge only, which then ends the child in order.

    When the `with` block fails because the child died, a LinkError with the child's last words takes the error's place.
    """

    address: str
    """Where it serves, "127.0.0.1:PORT"."""

    def __init__(
        self,
        arguments: Sequence[str] = (),
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
        command: Optional[Sequence[str]] = None,
    ) -> None:
        """`arguments` are flags of `sft-cloud serve` beside those given here; `command` replaces the whole command.

        Raises UsageError when the cloud's part is not installed, LinkError when the child does not get to serving.
        """
        if command is None:
            _check_installed()
        # What is uploaded to a cloud of the edge's own is on this machine already: it is not worth keeping. The child
        # deletes it, too, as it outlives an edge that is killed; and locks it as long as it lives.
        self._state = TemporaryDirectory(_STATE_PREFIX)
        command = command or [*python_command("sft_cloud.cli", self._state.name), *_serve(arguments, self._state.name)]
        # A file, not a pipe: nothing has to read along.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            pass_fds=[self._state.lock],
        )
        self.pid = self._child.pid
        try:
            self.address = self._wait_for_address(start_timeout_seconds)
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def close(self) -> None:
        """Ends the child, if need be by force. Idempotent."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.terminate()
        if not self._has_ended(STOP_TIMEOUT_SECONDS):
            self._child.kill()
            self._child.wait()
        self._stderr.close()
        self._state.cleanup()

    def __enter__(self) -> CloudProcess:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        try:
            if isinstance(error, (ServerUnavailableError, SessionLostError)) and self._has_ended(DEATH_NOTICE_SECONDS):
                raise SessionLostError(str(self._death())) from error
        finally:
            self.close()

    def _wait_for_address(self, timeout_seconds: float) -> str:
        """Reads the child's line on standard output, {"event": "serving", "address": "127.0.0.1:PORT"}.

        Lines before it are somebody else's: of what Python itself runs first, such as a sitecustomize.
        """
        deadline = time.monotonic() + timeout_seconds
        stdout = self._child.stdout.fileno()  # type: ignore[union-attr]  # it is a pipe
        said = b""
        while True:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                within, lines = f"within {timeout_seconds:g} s", said.rpartition(b"\n")[0].splitlines()
                if lines:
                    told = printable(lines[-1].decode(errors="replace"))[:200]
                    raise LinkError(f"the cloud process should say where it serves {within}, but says: {told}")
                raise LinkError(f"the cloud process did not start serving {within}{self._last_words()}")
            piece = os.read(stdout, 4096)
            if not piece:
                self._has_ended(STOP_TIMEOUT_SECONDS)
                raise self._death()
            said += piece
            for line in said.split(b"\n")[:-1]:
                address = _address_in(line)
                if address is not None:
                    return address

    def _has_ended(self, within_seconds: float) -> bool:
        try:
            self._child.wait(within_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _death(self) -> LinkError:
        code = self._child.returncode
        if code is None:
            how = "closed its output"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return LinkError(f"the cloud process {how}{self._last_words()}")

    def _last_words(self) -> str:
        """The last line of the child's standard error, to be appended; the lines before it are logged."""
        # Not seek and read: the child writes at the same file position.
        size = os.fstat(self._stderr.fileno()).st_size
        tail = os.pread(self._stderr.fileno(), _LAST_BYTES, max(0, size - _LAST_BYTES)).decode(errors="replace")
        lines = [line.rstrip() for line in tail.splitlines() if line.strip()][-_LAST_LINES:]
        for line in lines[:-1]:
            logger.error("sft-cloud: %s", line)
        return f": {lines[-1].strip()}" if lines else " and left no message"


def _address_in(line: bytes) -> Optional[str]:
    try:
        event = json.loads(line)
        return str({"serving": event["address"]}[event["event"]])
    except (ValueError, TypeError, KeyError):
        return None


def _check_installed() -> None:
    # The cloud's own package comes with every installation; what it stands on does not.
    needed = ("sft_cloud", "grpc_health", "grpc_reflection")
    if sys.version_info < (3, 10) or any(importlib.util.find_spec(name) is None for name in needed):
        raise UsageError(
            "training without --server HOST:PORT needs the cloud's part here too: "
            "Python 3.10 or later, and pip install 'split-fine-tuning[cloud]'"
        )


def _serve(arguments: Sequence[str], state_dir: str) -> List[str]:
    fixed = ["--host", "127.0.0.1", "--port", "0", "--exit-with-stdin", "--log-level", "warning"]
    return ["serve", *fixed, "--state-dir", state_dir, *arguments]
