"""What every call goes through before the service sees it: size, form, quotas, and limits on waiting.

An interceptor, so that no method can forget it. Messages are taken as bytes and parsed here, and a request of one
message is read here, too: gRPC itself would wait for it, on a thread of the server, as long as the other side likes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import HEALTH_WATCH, MAX_MESSAGE_BYTES, MAX_PROBE_BYTES, PART_BYTES, SERVICE, TRAIN
from sft_cloud.access import OPEN_METHODS
from sft_cloud.admission.assembly import COPIES, Assembly
from sft_cloud.admission.connections import ConnectionGuard
from sft_cloud.admission.deadlines import Deadlines
from sft_cloud.admission.pace import Pace
from sft_cloud.admission.quotas import Quotas
from sft_cloud.admission.wire_check import check_wire
from sft_cloud.identity import Identity
from sft_cloud.memory import Charge, Kind, MemoryBudget
from sft_cloud.observability import AuditLog, CallRecord
from sft_cloud.rpc import Call, Handler, behaviour_of, outcome, raw

_METHODS = pb.DESCRIPTOR.services_by_name["SplitTraining"].methods_by_name

_MAX_OTHER_BYTES = 1 << 16
_MAX_BYTES = {
    "OpenSession": 4 << 20,  # configuration, adapters, and the names of all parameters
    "UploadBlob": (1 << 20) + 1024,
    "Train": PART_BYTES + 1024,
    "Probe": MAX_PROBE_BYTES + 1024,
}


SMALL_PART_BYTES = 1 << 16
"""Of an upload: an edge's have a megabyte each but for the last, and smaller ones cost as much time."""


class AdmissionInterceptor(grpc.ServerInterceptor):
    """Stands in front of all services of a server."""

    def __init__(
        self,
        connections: ConnectionGuard,
        quotas: Quotas,
        deadlines: Deadlines,
        audit: AuditLog,
        budget: MemoryBudget,
        pace: Pace,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        """`wait`: for an event, at most so many seconds."""
        self._connections = connections
        self._quotas = quotas
        self._deadlines = deadlines
        self._audit = audit
        self._budget = budget
        self._pace = pace
        self._wait = wait

    def check_left(self, owner: Identity, data: bytes) -> None:
        """The form of a message of a stream that came within another one. Raises ProtocolError."""
        with self._quotas.check_of_form(owner):
            check_wire(data, _METHODS["Train"].input_type)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        method = str(handler_call_details.method)
        if method in OPEN_METHODS:  # whose handlers see to strangers themselves
            return handler
        if handler is None:
            # gRPC would say so, too, but at once, however often somebody asks.
            handler = grpc.stream_unary_rpc_method_handler(_no_such_method, bytes, bytes)
        admitted = _Admitted(self, method, handler)
        return raw(handler, admitted.one_answer, admitted.many_answers)


def _no_such_method(_: object, context: Call) -> None:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method on this server")


class _Admitted:
    """One method behind it."""

    def __init__(self, admission: AdmissionInterceptor, method: str, handler: Handler) -> None:
        self._admission = admission
        self._method = method
        self._handler: Any = handler
        self._behaviour = behaviour_of(handler)
        name = method.rpartition("/")[2]
        ours = _METHODS.get(name) if method.startswith(f"/{SERVICE}/") else None
        self._descriptor: Descriptor | None = ours.input_type if ours is not None else None
        self._max_bytes = _MAX_BYTES.get(name, _MAX_OTHER_BYTES) if ours is not None else _MAX_OTHER_BYTES

    def one_answer(self, received: Iterator[bytes], context: Call) -> bytes:
        with self._call(context) as call:
            response = self._behaviour(self._argument(received, context, call), context)
            call.record.answered(response)
            data = self._serialized(response)
            call.count(len(data))
            call.record.finished()
            # gRPC sends it when this thread has gone, and the call is over when it has been read.
            call.ends_with(self._admission._deadlines.stalling("answers are not read", context.cancel, len(data)))
            return data

    def many_answers(self, received: Iterator[bytes], context: Call) -> Iterator[list[bytes]]:
        deadlines = self._admission._deadlines
        # Who watches the server's health sends nothing more, so all of it counts as idle.
        lasting = deadlines.idles("idle stream", context.cancel) if self._method == HEALTH_WATCH else nullcontext()
        with self._call(context) as call, lasting:
            for response in self._behaviour(self._argument(received, context, call), context):
                call.record.answered(response)
                data = self._serialized(response)
                del response
                # An answer that is computed is sent: the next message is refused instead.
                call.count(len(data), refuses=self._method != TRAIN)
                size, sent = len(data), [data]
                del data
                with deadlines.stalls("answers are not read", context.cancel, size):
                    yield sent
            call.record.finished()

    @contextmanager
    def _call(self, context: Call) -> Iterator[_Call]:
        admission = self._admission
        record = CallRecord(admission._audit, self._method, context.peer())
        try:
            record.who = context.caller.name
            call = _Call(admission, record, context)
            try:
                call.ends_with(admission._connections.admitted(context.peer(), record.who))
                admission._pace.check()
                call.ends_with(admission._quotas.call(context.caller))
                yield call
            finally:
                call.handler_ends()
        except grpc.RpcError:
            raise  # the other side has gone
        except Exception as error:
            record.refused(*outcome(context, error))
            raise

    def _argument(self, received: Iterator[bytes], context: Call, call: _Call) -> Any:
        messages = self._messages(received, context, call)
        if self._handler.request_streaming:
            return messages
        first = next(messages, None)
        if first is None:
            raise ProtocolError("the call ended before its request had come")
        return first

    def _messages(self, received: Iterator[bytes], context: Call, call: _Call) -> Iterator[Any]:
        deadlines, reason = self._admission._deadlines, "no first message"
        charge = self._admission._budget.charge(Kind.MESSAGES, 0, context.caller)
        call.ends_with(charge.release)
        while True:
            may_idle = self._method == TRAIN and reason != "no first message"
            waits = deadlines.idles if may_idle else deadlines.stalls
            with waits(reason, context.cancel):
                data = next(received, None)
            if data is None:
                return
            call.count(len(data))
            if reason == "no next part" and len(data) < SMALL_PART_BYTES:
                call.rest(len(data))
            charge.resize(COPIES * len(data))
            message = self._parsed(data, call)
            del data  # here and below: a stream that idles must not keep a quarter of a gigabyte
            if isinstance(message, pb.EdgeMessage) and message.HasField("part"):
                message = self._whole(message.part, charge, received, context, call)
            call.record.requested(message)
            call.check(message)
            yield message
            del message
            charge.resize(0)
            reason = "idle stream" if self._method == TRAIN else "no next part"

    def _whole(
        self, first: pb.Part, charge: Charge, received: Iterator[bytes], context: Call, call: _Call
    ) -> pb.EdgeMessage:
        """The message that comes in parts, of which this is the first. Charged as long as it is held."""
        budget, deadlines = self._admission._budget, self._admission._deadlines
        size = COPIES * first.total_bytes
        whole = Assembly(first, charge, (budget.host or budget).most_bytes(size, context.caller))
        del first
        with deadlines.keeps_pace("a message comes too slowly", context.cancel) as came:
            while not whole.is_whole:
                with deadlines.stalls("no next part", context.cancel):
                    data = next(received, None)
                if data is None:
                    raise ProtocolError("the stream ended in the middle of a message")
                came(len(data))
                call.count(len(data))
                whole.add(self._parsed(data, call))
        message: pb.EdgeMessage = self._parsed(whole.joined(), call, MAX_MESSAGE_BYTES)
        return message

    def _parsed(self, data: bytes, call: _Call, max_bytes: int | None = None) -> Any:
        most = self._max_bytes if max_bytes is None else max_bytes
        if len(data) > most:
            raise ProtocolError(f"a message of {len(data)} bytes came; this method takes at most {most} in one")
        if self._descriptor is not None:
            with call.check_of_form():
                check_wire(data, self._descriptor)
        try:
            return self._handler.request_deserializer(data)
        except DecodeError:
            name = self._descriptor.name if self._descriptor is not None else "message"
            raise ProtocolError(f"what came is no {name}") from None

    def _serialized(self, response: Any) -> bytes:
        data: bytes = self._handler.response_serializer(response)
        return data


class _Call:
    """One call of a caller."""

    def __init__(self, admission: AdmissionInterceptor, record: CallRecord, context: Call) -> None:
        self.record = record
        self._admission = admission
        self._caller = context.caller
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._left = 2  # the handler, and the call
        self._ends: list[Callable[[], None]] = []

        def call_ends() -> None:
            self._over.set()
            self.handler_ends()

        if not context.add_callback(call_ends):
            call_ends()

    def ends_with(self, end: Callable[[], None]) -> None:
        """Has `end` called once handler and call are both over: a handler may outlive its call, and the reverse."""
        with self._lock:
            self._ends.append(end)

    def handler_ends(self) -> None:
        """One of the two is over."""
        with self._lock:
            self._left -= 1
            ends = [] if self._left else self._ends
        for end in ends:
            end()

    def check_of_form(self) -> AbstractContextManager[None]:
        """For the block in which a message is looked through."""
        return self._admission._quotas.check_of_form(self._caller)

    def rest(self, size: int) -> None:
        """After a message that was hardly worth it."""
        self._admission._pace.rest(self._caller.name, size)

    def count(self, size: int, refuses: bool = True) -> None:
        self._admission._quotas.count_bytes(self._caller, size, refuses)

    def check(self, message: Any) -> None:
        """What a message asks for, against what is for the caller."""
        if isinstance(message, pb.OpenSessionRequest):
            self._admission._quotas.count_open(self._caller)
            self._caller.limits.check_model_name(message.model_name)
            self._caller.limits.check_rank(message.cut.split_rank)  # 0 for sl, whose width the opener knows
        elif isinstance(message, pb.EdgeMessage) and message.HasField("commit"):
            # One that comes again after a reconnect counts again: only the session knows which it has seen, and the
            # few that can be under way are no harm.
            seconds = self._admission._quotas.seconds_to_wait(self._caller)
            if seconds:
                self._admission._wait(self._over, seconds)
