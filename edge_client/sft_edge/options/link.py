"""Options of the way to the server: where it is, who calls, and how long to wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from sft.cli.durations import Duration
from sft.cli.options import above_zero, at_least
from sft.client.credentials import ClientOptions, Credentials, read_credentials
from sft.errors import UsageError
from sft.wire.protocol import KEEPALIVE_SECONDS


@dataclass
class LinkOptions(ClientOptions):
    """The way to the cloud."""

    server: Optional[str] = None
    """HOST:PORT of a running `sft-cloud serve`; without it a cloud is started here and ended with the run"""

    labels: Literal["cloud", "local"] = "cloud"
    """where the loss is computed: on the cloud, with the labels of training rows beside the activation, or here, at the
    price of a second round trip: no label is sent then, but the gradient that is sent tells it to who computes"""

    wait: Duration = Duration("0s")
    """how long to wait, at the start, for a server that is absent or full; 0s ends at once"""

    connect_timeout: Duration = Duration("20s")
    """how long to wait for a server that takes a connection and then says nothing"""

    reply_timeout: Duration = Duration("10m")
    """how long to wait for the answer to one message before the link counts as broken"""

    reconnect_timeout: Duration = Duration("30m")
    """how long to try to mend a link that broke; 0s gives up at once"""

    reconnect_backoff: Duration = Duration("500ms")
    """about how long to wait before the first try; twice as long before each further one"""

    reconnect_backoff_max: Duration = Duration("30s")
    """longest time to wait between two tries"""

    keepalive_time: Duration = Duration(f"{KEEPALIVE_SECONDS}s")
    """after how much silence the server is asked for a sign of life; from 10s on"""

    keepalive_timeout: Duration = Duration(f"{KEEPALIVE_SECONDS}s")
    """how long it may take to give one before the link counts as broken"""

    def __post_init__(self) -> None:
        above_zero(self, "connect_timeout", "reply_timeout", "reconnect_backoff", "reconnect_backoff_max")
        above_zero(self, "keepalive_timeout")
        at_least(self, 0, "wait", "reconnect_timeout")
        if self.wait and self.server is None:
            raise UsageError("--wait needs --server: a cloud that is started here comes by itself")
        if self.keepalive_time < 10:
            raise UsageError(
                f"--keepalive-time must be 10s or more, not {self.keepalive_time}: servers hang up on less"
            )
        self._credentials = read_credentials(self)

    @property
    def credentials(self) -> Credentials:
        """How to call the server, as files are now."""
        return self._credentials.renewed()
