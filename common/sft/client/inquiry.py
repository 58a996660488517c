"""Questions to a cloud that change nothing there: what it is, how far away it is, and whether an idle way stays open.

For `sft-cloud status` and `sft-edge doctor`; nothing of gRPC is seen outside this file.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple, Optional, cast

import grpc

from sft.client.address import split_address
from sft.client.credentials import PLAINTEXT, Credentials
from sft.client.handshake import why_no_handshake
from sft.client.refusal import not_ours, refusal
from sft.errors import AccessError, LinkError, ProtocolError, ServerUnavailableError
from sft.printable import finite, said, tidied
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.protocol import HEALTH_WATCH

_EVERYTHING = b""
"""A HealthCheckRequest that asks for the server as a whole, serialized."""


class Probed(NamedTuple):
    """What one probe of the way found."""

    seconds: float
    """There and back, without the time that the cloud took."""
    clock_ahead_seconds: float
    """By how much the cloud's clock is ahead of ours; exact to half of `seconds`."""


class Inquiry:
    """Asks the cloud at the other end of a channel. Every question has a deadline."""

    def __init__(
        self, channel: grpc.Channel, address: str, timeout_seconds: float, credentials: Credentials = PLAINTEXT
    ) -> None:
        """`address` is for errors only; `credentials` say who asks."""
        self._channel = channel
        self._stub = SplitTrainingStub(channel)
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._credentials = credentials

    def status(self) -> pb.StatusResponse:
        """What the server is, and what it does for us, `tidied`. Raises LinkError and its classes."""
        try:
            response: pb.StatusResponse = self._stub.Status(
                pb.StatusRequest(), timeout=self._timeout_seconds, metadata=self._credentials.metadata()
            )
        except grpc.RpcError as error:
            raise self._error(error) from error
        return cast(pb.StatusResponse, tidied(response))

    def probe(self, sent_bytes: int = 0, received_bytes: int = 0) -> Probed:
        """Sends so many bytes and gets so many back. Raises LinkError and its classes."""
        request = pb.ProbeRequest(data=bytes(sent_bytes), reply_bytes=received_bytes)
        began, began_unix = time.perf_counter(), time.time()
        try:
            response: pb.ProbeResponse = self._stub.Probe(
                request, timeout=self._timeout_seconds, metadata=self._credentials.metadata()
            )
        except grpc.RpcError as error:
            raise self._error(error) from error
        seconds = time.perf_counter() - began
        if len(response.data) != received_bytes:
            raise ProtocolError(
                f"{self._address} sent {len(response.data)} bytes where {received_bytes} were asked for"
            )
        return Probed(
            seconds=max(seconds - max(finite(response.cloud_seconds), 0.0), 0.0),
            clock_ahead_seconds=finite(response.unix_seconds) - (began_unix + seconds / 2),
        )

    def wait_idle(self, seconds: float) -> Optional[str]:
        """Keeps a stream open that carries nothing but gRPC's keepalive; says why it ended before the time was over.

        None when it did not. Raises ProtocolError where the server offers no such stream.
        """
        open_watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(HEALTH_WATCH)
        watch = open_watch(_EVERYTHING, metadata=self._credentials.metadata())
        ended = threading.Event()
        if not watch.add_callback(ended.set):
            ended.set()  # it is over already
        try:
            if not ended.wait(seconds):
                return None
            code = watch.code()
            if code is grpc.StatusCode.UNIMPLEMENTED:
                raise ProtocolError(f"{self._address} does not offer a stream to watch")
            return f"{code.name}: {said(watch.details() or '')}"
        finally:
            watch.cancel()

    def _error(self, error: grpc.RpcError) -> LinkError:
        code, details = error.code(), said(error.details() or "")
        if code is grpc.StatusCode.UNIMPLEMENTED:  # the methods asked here came later than others
            return ProtocolError(f"{not_ours(self._address)}, or one of an old release")
        if code is grpc.StatusCode.UNAVAILABLE:
            where = split_address(self._address, "--server")
            why = why_no_handshake(where.host, where.port, self._credentials, self._timeout_seconds)
            if why is not None:
                return AccessError(f"{self._address} {why}")
            return ServerUnavailableError(f"nobody answers at {self._address} ({details})")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServerUnavailableError(f"{self._address} did not answer within {self._timeout_seconds:g} s")
        return refusal(code, details, self._address, self._credentials) or LinkError(
            f"{self._address} did not answer ({code.name}: {details})"
        )
