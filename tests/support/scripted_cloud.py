"""A cloud without a model, behind real gRPC: it answers by a script and remembers what came."""

from __future__ import annotations

import hashlib
import threading
from concurrent import futures
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import grpc
from support.proxy import TcpProxy

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingServicer, add_SplitTrainingServicer_to_server
from sft.wire.codec.rows import NAMES
from sft.wire.protocol import SERVER_OPTIONS
from sft_edge.link.grpc_transport import GrpcTransport

TIMEOUT_SECONDS = 20.0

WEIGHTS = [b"net_2, ", b"as it is"]
OPTIMIZER_STATE = [b"moments"]


class ScriptedCloud(SplitTrainingServicer):
    """By default a cloud whose loss is the step's number and whose gradient is the activation."""

    def __init__(self) -> None:
        self.wanted: List[str] = []
        """Blobs that it says it lacks until they were uploaded."""
        self.open_error: Optional[Tuple[grpc.StatusCode, str]] = None
        """OpenSession ends with it."""
        self.before_answer: Callable[[pb.EdgeMessage, grpc.ServicerContext], None] = lambda message, context: None
        """Called in the stream's thread before a message is answered."""
        self.change_answer: Callable[[pb.CloudMessage], pb.CloudMessage] = lambda answer: answer
        self.before_chunk: Callable[[grpc.ServicerContext], None] = lambda context: None
        """Called before a chunk of a download is sent."""
        self.last_message: Callable[[pb.EdgeMessage], bool] = lambda message: False
        """When it holds the stream ends properly, without an answer."""
        self.received: List[pb.EdgeMessage] = []
        self.answers: Dict[int, pb.CloudMessage] = {}
        """By number: what a message that comes again is answered with."""
        self.blobs: Dict[str, bytes] = {}
        self.weights = WEIGHTS
        """What a download gives, in parts."""
        self.requests: List[pb.OpenSessionRequest] = []
        self.codecs = list(NAMES.values())
        self.keeps = False
        """Whether it says that it keeps activations."""
        self.ended_properly = threading.Event()
        """A stream was ended by the edge, in order."""
        self.ended = threading.Event()
        """A stream was ended by the edge, in order or not."""
        self.hanging = threading.Event()
        """A script hangs."""
        self.released = threading.Event()
        """Set when the test is over; scripts that hang wait for it."""

    def OpenSession(self, request: pb.OpenSessionRequest, context: grpc.ServicerContext) -> pb.OpenSessionResponse:
        self.requests.append(request)
        if self.open_error is not None:
            context.abort(*self.open_error)
        missing = [sha256 for sha256 in self.wanted if sha256 not in self.blobs]
        if missing:
            return pb.OpenSessionResponse(missing_blobs=missing, codecs=self.codecs)
        return pb.OpenSessionResponse(session_id="s1", device="cpu", codecs=self.codecs, keeps_activations=self.keeps)

    def UploadBlob(
        self, request_iterator: Iterator[pb.UploadBlobRequest], context: grpc.ServicerContext
    ) -> pb.UploadBlobResponse:
        requests = list(request_iterator)
        data = b"".join(request.data for request in requests)
        sha256 = requests[0].sha256 if requests else ""
        if not requests or requests[0].total_bytes != len(data) or hashlib.sha256(data).hexdigest() != sha256:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the blob is not what it was announced to be")
        self.blobs[sha256] = data
        return pb.UploadBlobResponse()

    def Train(
        self, request_iterator: Iterator[pb.EdgeMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.CloudMessage]:
        context.add_callback(self.ended.set)
        for message in request_iterator:
            self.received.append(message)
            if self.last_message(message):
                return
            if message.HasField("close"):
                break
            self.before_answer(message, context)
            if message.number not in self.answers:
                self.answers[message.number] = _answer(message)
            if message.HasField("attach"):
                attached = self.answers.pop(0)
                attached.attached.last_number = max(self.answers, default=0)
                yield self.change_answer(attached)
                for number in sorted(self.answers):
                    if number > message.answered:
                        yield self.answers[number]
            else:
                yield self.change_answer(self.answers[message.number])
        self.ended_properly.set()

    def DownloadWeights(
        self, request: pb.DownloadWeightsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadWeightsResponse]:
        skip = request.offset
        for data in OPTIMIZER_STATE if request.optimizer_state else self.weights:
            if skip < len(data):
                self.before_chunk(context)
                yield pb.DownloadWeightsResponse(data=data[skip:])
            skip = max(skip - len(data), 0)

    def hang(self, message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
        """A script: no training message is answered before the test is over."""
        if message.WhichOneof("body") != "attach":
            self.hanging.set()
            self.released.wait(TIMEOUT_SECONDS)


def _answer(message: pb.EdgeMessage) -> pb.CloudMessage:
    answer = pb.CloudMessage(
        number=message.number, step=message.step, micro_batch=message.micro_batch, cloud_seconds=0.25
    )
    body = message.WhichOneof("body")
    if body == "attach":
        answer.attached.next_step = 0
    elif body == "forward" and not message.forward.HasField("labels"):
        answer.outputs.logits.CopyFrom(message.forward.activation.packed)
    elif body == "backward":
        answer.result.packed_gradient.CopyFrom(message.backward.gradient)
    elif body == "forward":
        answer.result.loss = float(message.step)
        answer.result.packed_gradient.CopyFrom(message.forward.activation.packed)
    elif body == "evaluate":
        answer.evaluation.logits.CopyFrom(message.evaluate.activation.packed)
    else:
        answer.committed.next_step = message.commit.step + 1
    return answer


@contextmanager
def serving(cloud: SplitTrainingServicer) -> Iterator[str]:
    """Serves on a free loopback port; yields the address."""
    pool = futures.ThreadPoolExecutor(max_workers=8)
    server = grpc.server(pool, options=SERVER_OPTIONS)
    add_SplitTrainingServicer_to_server(cloud, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        if isinstance(cloud, ScriptedCloud):
            cloud.released.set()
        server.stop(grace=0).wait(TIMEOUT_SECONDS)
        pool.shutdown()


@contextmanager
def through_proxy(cloud: ScriptedCloud, **timeouts: float) -> Iterator[Tuple[TcpProxy, GrpcTransport]]:
    with serving(cloud) as address, TcpProxy(address) as proxy:
        yield proxy, GrpcTransport(proxy.address, **timeouts)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)
