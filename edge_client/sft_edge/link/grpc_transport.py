"""The transport over gRPC. Nothing of gRPC, its errors least of all, is seen outside this file.

What a status becomes, where `sft.client.refusal` does not say it for every call:

    while opening a session
      UNAVAILABLE, and nobody listens                  ServerUnavailableError
      UNAVAILABLE, as TLS could not be agreed on       AccessError
      UNAVAILABLE: the port takes TCP connections,
        but says nothing or nothing that is gRPC       NotOursError
      UNAVAILABLE: whoever answered has gone, or is
        busy; CANCELLED, ABORTED, UNKNOWN              StreamBrokenError
      DEADLINE_EXCEEDED                                ServerUnavailableError
      others                                           LinkError
    during stream, upload and download
      UNAVAILABLE, ABORTED, CANCELLED and others       StreamBrokenError
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import grpc

from sft.client.address import split_address
from sft.client.channel import open_channel
from sft.client.credentials import PLAINTEXT, Credentials
from sft.client.handshake import why_no_handshake
from sft.client.inquiry import Inquiry, instances_of
from sft.client.refusal import not_ours, proxy_refusal, refusal
from sft.errors import (
    AccessError,
    LinkError,
    NotOursError,
    ProtocolError,
    ServerUnavailableError,
    SessionLostError,
    SFTError,
    StreamBrokenError,
)
from sft.printable import format_bytes, said
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.protocol import CLIENT_OPTIONS, MAX_PROBE_BYTES, TRAIN
from sft_edge.link.meter import Meter
from sft_edge.link.outgoing import Outgoing
from sft_edge.link.stall_guard import StallGuard
from sft_edge.link.tracing import edge_tracer, traced
from sft_edge.link.transport import SEVERAL_SERVERS, Stream, Transport
from sft_edge.options import LinkOptions

OPEN_TIMEOUT_SECONDS = 600.0
"""For OpenSession: the cloud may have to fetch a model from the hub first."""

_LOOKS, _LOOK_SECONDS = 8, 5.0
"""How often to ask who answers, where calls may reach different servers, and how long to wait for each answer."""

STALL_TIMEOUT_SECONDS = 120.0
"""For one chunk of an upload or download. A whole file may take as long as the link needs."""


class Keepalive(NamedTuple):
    """How a link that has died without a word is found out: in at most the sum of both, in seconds."""

    time_seconds: float = LinkOptions.keepalive_time
    """Of silence, before the other side is asked for a sign of life. Servers take less than ten for an attack."""

    timeout_seconds: float = LinkOptions.keepalive_timeout
    """For the sign of life."""


class GrpcTransport(Transport):
    """gRPC to `address`, "HOST:PORT" or "[IPv6]:PORT". Nothing is dialed before the first call.

    Raises UsageError when the address is malformed.
    """

    def __init__(
        self,
        address: str,
        connect_timeout_seconds: float = LinkOptions.connect_timeout,
        open_timeout_seconds: float = OPEN_TIMEOUT_SECONDS,
        stall_timeout_seconds: float = STALL_TIMEOUT_SECONDS,
        keepalive: Keepalive = Keepalive(),  # noqa: B008  # a tuple
        credentials: Credentials = PLAINTEXT,
        meter: Optional[Meter] = None,
    ) -> None:
        """`connect_timeout_seconds` is from the first packet to the end of gRPC's handshake. `meter` counts what
        crosses, and says when it may."""
        self._address = address
        self._credentials = credentials
        self._host_and_port = split_address(address, "server")
        self._connect_timeout_seconds = connect_timeout_seconds
        self._open_timeout_seconds = open_timeout_seconds
        self._stall_timeout_seconds = stall_timeout_seconds
        self._keepalive = keepalive
        self._meter = meter or Meter()
        self._channel = self._dial()
        self._closed = threading.Event()
        self._answered: List[str] = []  # which servers, each time that it was another than before

    def _dial(self) -> grpc.Channel:
        options: List[Tuple[str, int]] = [
            *CLIENT_OPTIONS,
            # Despite its name also the time an attempt to connect may take: a peer may accept and then be silent.
            ("grpc.min_reconnect_backoff_ms", int(self._connect_timeout_seconds * 1000)),
            ("grpc.keepalive_time_ms", int(self._keepalive.time_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self._keepalive.timeout_seconds * 1000)),
        ]
        channel = traced(open_channel(self._address, self._credentials, options), edge_tracer())
        self._stub = SplitTrainingStub(channel)
        self._meter.connect()
        # Without serializers: see transport.py.
        self._train: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(TRAIN)
        return channel

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        """See Transport. Fails at once when nobody listens, and within the connect time-out when the peer is silent."""
        try:
            response: pb.OpenSessionResponse
            self._meter.send(request.ByteSize(), self._closed)
            response, call = self._stub.OpenSession.with_call(
                request, timeout=self._open_timeout_seconds, metadata=self._credentials.metadata()
            )
        except grpc.RpcError as error:
            raise self._opening_error(error) from error
        self._meter.receive(response.ByteSize())
        self._note(call)
        return response

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        """See Transport. The way counts as broken when no chunk went through for the stall time-out."""
        self.check_room(total_bytes)  # once more where it broke
        failure: List[BaseException] = []

        def requests() -> Iterator[pb.UploadBlobRequest]:
            request = pb.UploadBlobRequest(sha256=sha256, total_bytes=total_bytes)
            try:
                for piece in (piece for chunk in chunks for piece in self._meter.pieces(chunk)):
                    request.data = piece
                    if not self._meter.send(request.ByteSize(), guard.over, guard.progress):
                        return
                    yield request
                    guard.progress()
                    request = pb.UploadBlobRequest()
            except (SFTError, OSError) as error:
                failure.append(error)  # the upload ends too short, which the cloud refuses

        with StallGuard(self._stall_timeout_seconds) as guard:
            with _renewed_meanwhile():
                call = self._stub.UploadBlob.future(requests(), metadata=self._credentials.metadata())
            guard.watch(call.cancel)
            try:
                self._meter.receive(call.result().ByteSize())
                self._note(call)
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                if not failure:
                    raise self._error(call, guard.stalled) from error
            finally:
                call.cancel()  # harmless after the end; after Ctrl-C it stops the upload
        if failure:
            raise failure[0]

    def stream(self, messages: Iterator[bytes]) -> Stream:
        """See Transport. A link that breaks without a word is noticed by gRPC's keepalive."""
        outgoing = Outgoing(messages, self._meter)
        with _renewed_meanwhile():
            call = self._train(outgoing.parts(), metadata=self._credentials.metadata())
        return _GrpcStream(call, self._error, self._meter, outgoing)

    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        """See Transport. The way counts as broken when no chunk came for the stall time-out."""
        if not optimizer_state:
            self._meter.bring(offset)
        if offset:
            self._meter.connect()  # gRPC dials by itself where the connection broke, too
        receive = self._meter.receive if optimizer_state else self._meter.receive_result
        with StallGuard(self._stall_timeout_seconds) as guard:
            request = pb.DownloadWeightsRequest(session_id=session_id, optimizer_state=optimizer_state, offset=offset)
            self._meter.send(request.ByteSize(), guard.over)
            with _renewed_meanwhile():
                call = self._stub.DownloadWeights(request, metadata=self._credentials.metadata())
            guard.watch(call.cancel)
            try:
                for response in call:
                    guard.progress()
                    receive(response.ByteSize())
                    yield response.data
                    self._meter.wait_to_receive(guard.over, guard.progress)
            except grpc.RpcError as error:
                raise self._error(call, guard.stalled) from error
            finally:
                call.cancel()

    def inquiry(self, timeout_seconds: float) -> Inquiry:
        """For questions about the cloud and the way to it, by the same connection; it is closed with this."""
        return Inquiry(self._channel, self._address, timeout_seconds, self._credentials)

    def check_session(self, session_id: str) -> None:
        """See Transport."""
        try:
            status = self._ask_status()
        except (grpc.RpcError, ValueError):  # the latter where another thread renews the way
            return
        is_there = any(session_id.startswith(session.label) for session in status.sessions)
        if (status.caller and not is_there) or self._takes_turns():
            raise self._not_there("there is no such session on this server; it has ended")

    def check_carries(self, total_bytes: int) -> None:
        """See Transport."""
        request = pb.ProbeRequest(data=bytes(min(total_bytes, MAX_PROBE_BYTES)))
        if 2 * request.ByteSize() > self._meter.room or not self._meter.send(request.ByteSize(), self._closed):
            return
        try:
            answer = self._stub.Probe(
                request, timeout=self._stall_timeout_seconds, metadata=self._credentials.metadata()
            )
            self._meter.receive(answer.ByteSize())
        except grpc.RpcError as error:
            refused = proxy_refusal(said(error.details() or ""), self._address)
            if isinstance(refused, ProtocolError):
                raise refused from error
        except ValueError:  # another thread renews the way
            return

    def check_room(self, total_bytes: int) -> None:
        """See Transport."""
        self._meter.check(total_bytes, f"the cloud lacks {format_bytes(total_bytes)} of the model")

    def check_again(self, total_bytes: int, steps: int) -> None:
        """See Transport."""
        self._meter.check_again(total_bytes, steps)

    def has_held(self, seconds: float) -> bool:
        """See Transport."""
        return self._meter.has_held(seconds)

    def _not_there(self, details: str) -> LinkError:
        if self.several_servers():
            return ProtocolError(f"{self._address}: {SEVERAL_SERVERS}")
        return SessionLostError(f"{self._address}: {details}")

    def _ask_status(self) -> pb.StatusResponse:
        status: pb.StatusResponse
        self._meter.send(0, self._closed)
        status, call = self._stub.Status.with_call(
            pb.StatusRequest(), timeout=_LOOK_SECONDS, metadata=self._credentials.metadata()
        )
        self._meter.receive(status.ByteSize())
        self._note(call)
        return status

    def several_servers(self) -> bool:
        """See Transport. A server that was started anew is another one from then on; here one comes back."""
        for _ in range(_LOOKS):
            if self._takes_turns():
                return True
            try:
                self._ask_status()
            except (grpc.RpcError, ValueError):
                return False
        return self._takes_turns()

    def _takes_turns(self) -> bool:
        return len(self._answered) > len(set(self._answered))

    def _note(self, call: Any) -> None:
        for instance in instances_of(call):
            if self._answered[-1:] != [instance]:
                self._answered.append(instance)

    def renew(self) -> None:
        """See Transport."""
        before = self._channel
        if not self._closed.is_set():
            self._credentials = self._credentials.renewed()
            self._channel = self._dial()  # first: another thread may be about to make a call
        before.close()

    def close(self) -> None:
        """See Transport."""
        self._closed.set()
        self._channel.close()

    def _opening_error(self, error: grpc.RpcError) -> LinkError:
        code, details = error.code(), said(error.details() or "")
        of_proxy = proxy_refusal(details, self._address)
        if of_proxy is not None:
            return of_proxy
        if code == grpc.StatusCode.UNAVAILABLE:
            reason = self._why_not_reachable()
            if reason is not None:
                return ServerUnavailableError(
                    f"nobody answers at {self._address} ({reason}): is `sft-cloud serve` running there?"
                )
            why = why_no_handshake(*self._host_and_port, self._credentials, self._connect_timeout_seconds)
            if why is not None:
                return AccessError(f"{self._address} {why}")
            if "failed to connect" in details:  # gRPC's words when TCP or the handshake on top of it failed
                return NotOursError(not_ours(self._address))
        if code in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.ABORTED,
            grpc.StatusCode.UNKNOWN,
        ):
            return StreamBrokenError(f"{self._address} opens no session now: {details}")
        if code == grpc.StatusCode.NOT_FOUND:
            return SessionLostError(f"{self._address}: {details}")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServerUnavailableError(
                f"{self._address} did not open a session within {self._open_timeout_seconds:g} s: see the server's log"
            )
        return refusal(code, details, self._address, self._credentials) or LinkError(
            f"{self._address} could not open a session ({code.name}: {details}): see the server's log"
        )

    def _error(self, call: grpc.RpcError, stalled: bool = False) -> LinkError:
        code, details = call.code(), said(call.details() or "")
        if stalled:
            return StreamBrokenError(
                f"nothing moved between here and {self._address} for {self._stall_timeout_seconds:g} s"
            )
        self._note(call)
        if code == grpc.StatusCode.NOT_FOUND:
            return self._not_there(details)
        return refusal(code, details, self._address, self._credentials) or StreamBrokenError(
            f"the link to {self._address} broke ({code.name}: {details})"
        )

    def _why_not_reachable(self) -> Optional[str]:
        """Why no TCP connection can be made, in the operating system's words; None when one can."""
        try:
            socket.create_connection(self._host_and_port, self._connect_timeout_seconds).close()
        except OSError as error:
            return error.strerror or str(error)
        return None


@contextmanager
def _renewed_meanwhile() -> Iterator[None]:
    """A call on a channel that another thread has just closed."""
    try:
        yield
    except ValueError as error:  # as gRPC has it
        raise StreamBrokenError("the connection was given up while it was about to be used") from error


class _GrpcStream(Stream):
    def __init__(
        self,
        call: grpc._CallIterator[bytes],
        to_domain_error: Callable[[grpc.RpcError], LinkError],
        meter: Meter,
        outgoing: Outgoing,
    ) -> None:
        self._call = call
        self._to_domain_error = to_domain_error
        self._meter, self._outgoing = meter, outgoing

    def __next__(self) -> bytes:
        try:
            data = next(self._call)
        except (StopIteration, grpc.RpcError) as error:
            if self._outgoing.refused is not None:
                raise self._outgoing.refused from error
            if isinstance(error, StopIteration):
                raise
            raise self._to_domain_error(error) from error
        self._meter.receive(len(data))
        return data

    def cancel(self) -> None:
        self._outgoing.over.set()
        self._call.cancel()


def transport_of(address: str, link: LinkOptions, meter: Optional[Meter] = None) -> GrpcTransport:
    """The way to `address` as the options want it. Raises UsageError."""
    keepalive = Keepalive(link.keepalive_time, link.keepalive_timeout)
    return GrpcTransport(address, link.connect_timeout, keepalive=keepalive, credentials=link.credentials, meter=meter)
