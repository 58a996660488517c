"""Questions to a cloud that change nothing there: what it is, how far away it is, and whether an idle way stays open.

For `sft-cloud status` and `sft-edge doctor`; nothing of gRPC is seen outside this file.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Iterator, NamedTuple, Optional, Set, Tuple, cast

import grpc

from sft.client.address import split_address
from sft.client.credentials import PLAINTEXT, Credentials
from sft.client.handshake import why_no_handshake
from sft.client.refusal import not_ours, proxy_refusal, refusal
from sft.errors import AccessError, LinkError, ProtocolError, ServerUnavailableError
from sft.printable import finite, said, tidied
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.protocol import INSTANCE_KEY

PIECE_BYTES = 64 << 10
"""Of a message on a stream that is tried out."""


def instances_of(call: Any) -> Iterator[str]:
    """Which server has ended a call; nothing where it does not say, or nobody has."""
    for key, value in call.trailing_metadata() or ():
        if key == INSTANCE_KEY:
            yield said(str(value))[:64]


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
        self.instances: Set[str] = set()
        """Of the servers that have answered, as far as they say who they are."""

    def status(self) -> pb.StatusResponse:
        """What the server is, and what it does for us, `tidied`. Raises LinkError and its classes."""
        try:
            response: pb.StatusResponse = self._ask(self._stub.Status, pb.StatusRequest())
        except grpc.RpcError as error:
            raise self._error(error) from error
        return cast(pb.StatusResponse, tidied(response))

    def probe(self, sent_bytes: int = 0, received_bytes: int = 0) -> Probed:
        """Sends so many bytes and gets so many back. Raises LinkError and its classes."""
        request = pb.ProbeRequest(data=bytes(sent_bytes), reply_bytes=received_bytes)
        began, began_unix = time.perf_counter(), time.time()
        try:
            response: pb.ProbeResponse = self._ask(self._stub.Probe, request)
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

    def keep_stream(self, sent_bytes: int, idle_seconds: float) -> Optional[Tuple[str, str]]:
        """Opens a stream as a run does, sends so many bytes by it, leaves it alone for so long, and uses it again.

        None where that went well; otherwise where it ended, `carried`, `kept` or `used`, and what gRPC says of it.
        Raises ProtocolError where the server has no stream for that.
        """
        outgoing: queue.SimpleQueue[Optional[pb.EdgeMessage]] = queue.SimpleQueue()
        stream = self._stub.Train(iter(outgoing.get, None), metadata=self._credentials.metadata())
        ended = threading.Event()
        if not stream.add_callback(ended.set):
            ended.set()  # it is over already
        where = "carried"

        def ask(size: int) -> None:
            late = threading.Timer(self._timeout_seconds, stream.cancel)
            late.daemon = True
            late.start()
            try:
                outgoing.put(pb.EdgeMessage(probe=pb.ProbeRequest(data=bytes(size))))
                next(stream)
            finally:
                late.cancel()

        try:
            for _ in range(max(1, sent_bytes // PIECE_BYTES)):
                ask(PIECE_BYTES if sent_bytes else 0)
            where = "kept"
            if ended.wait(idle_seconds):
                next(stream)
            where = "used"
            ask(0)
        except grpc.RpcError as error:
            code, details = error.code(), said(error.details() or "")
            refused = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
            if code in (*refused, grpc.StatusCode.UNIMPLEMENTED) and not proxy_refusal(details, self._address):
                raise ProtocolError(f"{self._address} has no stream to probe: an older release") from error
            return where, f"{code.name}: {details}"
        except StopIteration:
            return where, "it was ended in order"
        finally:
            outgoing.put(None)
            stream.cancel()
        return None

    def _ask(self, method: Any, request: Any) -> Any:
        response, call = method.with_call(request, timeout=self._timeout_seconds, metadata=self._credentials.metadata())
        self.instances.update(instances_of(call))
        return response

    def _error(self, error: grpc.RpcError) -> LinkError:
        code, details = error.code(), said(error.details() or "")
        of_proxy = proxy_refusal(details, self._address)
        if of_proxy is not None:
            return of_proxy
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
