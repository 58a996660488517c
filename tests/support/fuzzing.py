"""A caller that sends a server messages that are almost sound, of every type, and notes what each of them got."""

from __future__ import annotations

import hashlib
import queue
import random
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import grpc
import torch
from support.mutations import Mutator
from support.tiny_edge import TinyEdge, attach

from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import row_ends
from sft.wire.parts import parts_of

SERVICE = "/sft.v1.SplitTraining/"
HANG_SECONDS = 60.0
"""A call that has not ended by then hangs."""

_MESSAGES_A_SESSION = 40
_IN_PARTS = 0.02
"""Of the messages of a session: each is of two megabytes."""
_UNKNOWN = b"\xc2\x3e\x80\x80\x80\x01"
"""A field of number 1000 and 2 MiB begins."""
_BROKEN = ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "DATA_LOSS")
"""What a sound server answers to nothing that comes over the wire."""

Raw = Callable[..., Any]


class Fuzzer:
    """Not for several threads at once; each has its own."""

    def __init__(self, channel: grpc.Channel, edge: TinyEdge, seed: int, name: str = "") -> None:
        self.counts: Counter[Tuple[str, str]] = Counter()
        """How many messages of a kind got what: a status code, or "answered"."""
        self.mutated = 0
        """How many of them were not sound."""
        self.failures: List[str] = []
        """What no message should get, with the message."""
        self._edge = edge
        self._draw = random.Random(seed)
        self._mutator = Mutator(seed)
        self._metadata = [("name", name)] if name else []
        self._methods: Dict[str, Raw] = {}
        for method, streams in (
            ("OpenSession", "unary_unary"),
            ("UploadBlob", "stream_unary"),
            ("Train", "stream_stream"),
            ("DownloadWeights", "unary_stream"),
            ("Status", "unary_unary"),
            ("Probe", "unary_unary"),
        ):
            self._methods[method] = getattr(channel, streams)(SERVICE + method)
        self._blobs = edge.blobs()
        self._session_ids: List[str] = ["nobody"]
        self._requests = [
            edge.request(run_id=f"{seed:032x}", keep_key=b"k" * 32),
            edge.request(optimizer=pb.Optimizer(name="SGD")),
        ]
        self._states: List[str] = []  # blobs that a session can load

    def shoot(self) -> None:
        """One call with one such message, or a session with a number of them."""
        shot = self._draw.choices(
            (self._open, self._upload, self._begin_train, self._train, self._download, self._ask), (6, 6, 6, 4, 5, 6)
        )[0]
        shot()

    def _open(self) -> None:
        data = self._mutator.mutated(self._draw.choice(self._requests), self._requests)
        answer = self._note("OpenSessionRequest", data, lambda: self._call("OpenSession", data))
        if answer is not None:
            session_id = pb.OpenSessionResponse.FromString(answer).session_id
            if session_id:
                self._close(session_id)

    def _upload(self) -> None:
        sha256, content = self._draw.choice(list(self._blobs.items()))
        if self._draw.random() < 0.5:  # tensors that are not these, under their true hash
            content = self._mutator.mutated_bytes(content[: self._draw.choice((9, 200, len(content)))])
            sha256 = hashlib.sha256(content).hexdigest()
        first = pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content)
        data = self._mutator.mutated(first) if self._draw.random() < 0.7 else first.SerializeToString()
        self._note("UploadBlobRequest", data, lambda: self._call("UploadBlob", iter([data])))

    def _begin_train(self) -> None:
        message = attach(self._draw.choice(self._session_ids)) if self._draw.random() < 0.5 else self._edge.forward(0)
        data = self._mutator.mutated(message)
        self._note("EdgeMessage, first", data, lambda: list(self._call("Train", iter([data]))))

    def _download(self) -> None:
        data = self._mutator.mutated(pb.DownloadWeightsRequest(session_id=self._draw.choice(self._session_ids)))
        self._note("DownloadWeightsRequest", data, lambda: list(self._call("DownloadWeights", data)))

    def _ask(self) -> None:
        if self._draw.random() < 0.5:
            data = self._mutator.mutated(pb.StatusRequest()) if self._draw.random() < 0.5 else b""
            self._note("StatusRequest", data, lambda: self._call("Status", data))
        else:
            data = self._mutator.mutated(pb.ProbeRequest(data=b"x" * 100, reply_bytes=100))
            self._note("ProbeRequest", data, lambda: self._call("Probe", data))

    def _train(self) -> None:
        """A session that is used until it is refused."""
        session_id = self._session()
        if session_id is None:
            return
        outgoing: queue.SimpleQueue[Optional[bytes]] = queue.SimpleQueue()
        call = self._call("Train", iter(outgoing.get, None))
        outgoing.put(attach(session_id).SerializeToString())
        if self._note("EdgeMessage, attach", b"", lambda: next(call), mutated=False) is None:
            return
        state = _Course(self._edge, self._draw, self._states)
        for number in range(1, _MESSAGES_A_SESSION + 1):
            kind, message = state.next_message()
            message.number, message.answered = number, self._draw.choice((number - 1, max(0, number - 3)))
            sound = message.SerializeToString()
            if self._draw.random() < _IN_PARTS:
                self._in_parts(sound, outgoing, call)
                return
            data = self._mutator.mutated(message, state.seen) if self._draw.random() < 0.5 else sound
            outgoing.put(data)
            answer = self._note(f"EdgeMessage, {kind}", data, lambda: next(call), data != sound)
            if answer is None:
                break
            state.answered(pb.CloudMessage.FromString(answer), message)
        else:
            outgoing.put(pb.EdgeMessage(close=pb.Close()).SerializeToString())
            self._note("EdgeMessage, close", b"", lambda: list(call), mutated=False)
        outgoing.put(None)
        call.cancel()

    def _in_parts(self, sound: bytes, outgoing: queue.SimpleQueue[Optional[bytes]], call: Any) -> None:
        """A message made large by a field that nobody knows, in parts of which one is not sound; and the end."""
        parts = list(parts_of(sound + _UNKNOWN + bytes(2 << 20)))
        place = self._draw.randrange(len(parts))
        part = pb.EdgeMessage.FromString(parts[place])
        if self._draw.random() < 0.5:
            part.part.data = part.part.data[: self._draw.choice((0, 1, 1000))]
        parts[place] = self._mutator.mutated(part)
        for one in [*parts, pb.EdgeMessage(close=pb.Close()).SerializeToString(), None]:
            outgoing.put(one)
        self._note("EdgeMessage, part", parts[place][:1000], lambda: list(call))
        call.cancel()

    def _session(self) -> Optional[str]:
        request = self._draw.choice(self._requests[:1])
        try:
            response = pb.OpenSessionResponse.FromString(self._call("OpenSession", request.SerializeToString()))
            for sha256 in response.missing_blobs:
                blob = pb.UploadBlobRequest(
                    sha256=sha256, total_bytes=len(self._blobs[sha256]), data=self._blobs[sha256]
                )
                self._call("UploadBlob", iter([blob.SerializeToString()]))
            if response.missing_blobs:
                response = pb.OpenSessionResponse.FromString(self._call("OpenSession", request.SerializeToString()))
        except grpc.RpcError as error:
            if error.code().name != "RESOURCE_EXHAUSTED":  # the sessions of others are many, for a moment
                self.failures.append(f"a sound session was refused: {error.code().name} {error.details()}")
            return None
        self._session_ids = [*self._session_ids[-5:], response.session_id]
        if not self._states:
            self._keep_state(response.session_id)
        return response.session_id

    def _keep_state(self, session_id: str) -> None:
        request = pb.DownloadWeightsRequest(session_id=session_id)
        parts = map(pb.DownloadWeightsResponse.FromString, self._call("DownloadWeights", request.SerializeToString()))
        content = b"".join(part.data for part in parts)
        self._states.append(hashlib.sha256(content).hexdigest())
        blob = pb.UploadBlobRequest(sha256=self._states[0], total_bytes=len(content), data=content)
        self._call("UploadBlob", iter([blob.SerializeToString()]))

    def _close(self, session_id: str) -> None:
        messages = [attach(session_id), pb.EdgeMessage(close=pb.Close())]
        try:
            list(self._call("Train", iter([message.SerializeToString() for message in messages])))
        except grpc.RpcError as error:
            self.failures.append(f"a session could not be closed: {error.code().name} {error.details()}")

    def _call(self, method: str, request: Any) -> Any:
        return self._methods[method](request, timeout=HANG_SECONDS, metadata=self._metadata)

    def _note(self, kind: str, data: bytes, call: Callable[[], Any], mutated: bool = True) -> Any:
        """What came back; None for an error."""
        self.mutated += mutated
        try:
            answer = call()
        except StopIteration:
            self.counts[kind, "ended"] += 1
            return None
        except grpc.RpcError as error:
            code, details = error.code().name, str(error.details())
            self.counts[kind, code] += 1
            if code in _BROKEN or "Traceback" in details or "Exception" in details or len(details) > 2000:
                self.failures.append(f"{kind} got {code}: {details[:200]}; message {data.hex()[:4000]}")
            return None
        self.counts[kind, "answered"] += 1
        return answer


class _Course:
    """What an edge might say next, so that mutations reach all of a session."""

    def __init__(self, edge: TinyEdge, draw: random.Random, states: List[str]) -> None:
        self.seen: List[pb.EdgeMessage] = []
        self._states = states
        self._edge = edge
        self._draw = draw
        self._step = 0
        self._micro_batch = 0
        self._graphs: Dict[int, pb.Tensor] = {}
        self._kept: List[int] = []
        self._sequences = 0  # that the session keeps

    def next_message(self) -> Tuple[str, pb.EdgeMessage]:
        kind, message = self._draw.choice(list(self._kinds()))
        self.seen = [*self.seen[-5:], message]
        return kind, message

    def answered(self, answer: pb.CloudMessage, message: pb.EdgeMessage) -> None:
        """Keeps up with the session as well as can be: what was mutated may have done something else."""
        body = answer.WhichOneof("body")
        self._sequences += sum(map(bool, _activation(message).keep))
        if message.HasField("commit"):
            self._step, self._micro_batch, self._graphs, self._kept = self._step + 1, 0, {}, []
        if body == "outputs":
            self._graphs[answer.micro_batch] = answer.outputs.logits
        if message.HasField("forward"):
            self._micro_batch += 1
            if body == "result" and not message.forward.loss_scale:
                self._kept.append(answer.micro_batch)
        if message.HasField("backward"):
            self._graphs.pop(message.micro_batch, None)

    def _kinds(self) -> Iterator[Tuple[str, pb.EdgeMessage]]:
        edge, step, micro_batch = self._edge, self._step, self._micro_batch
        yield "forward", edge.forward(step, micro_batch)
        yield "forward without labels", edge.unlabelled(step, micro_batch)
        yield "forward kept aside", edge.forward(step, micro_batch, loss_scale=0.0)
        for numbered in (edge.forward(step, micro_batch), edge.evaluate()):
            _activation(numbered).keep.extend([self._sequences + 1, 0, 0])
            yield "keep", numbered
        if self._sequences:
            by_number = edge.forward(step, micro_batch)
            activation = _activation(by_number)
            packed, first = activation.packed, activation.lengths[0]
            ends = row_ends(packed, packed.data, packed.shape[0], edge.codecs.codes)
            activation.packed.data = packed.data[ends[first - 1] :]
            activation.packed.shape[0] -= activation.lengths[0]
            activation.kept.extend([self._draw.randint(1, self._sequences), 0, 0])
            yield "kept", by_number
        yield "evaluate", edge.evaluate(self._draw.randrange(3))
        if not self._graphs and not self._kept:
            yield "load_state", pb.EdgeMessage(step=step, load_state=pb.LoadState(sha256=self._states[0]))
        if not micro_batch:
            yield "save_checkpoint", pb.EdgeMessage(step=step, save_checkpoint=pb.SaveCheckpoint())
        yield "keep_checkpoints", pb.EdgeMessage(step=step, keep_checkpoints=pb.KeepCheckpoints(steps=[0, 10]))
        if micro_batch:
            yield "commit", edge.commit(step)
            yield "forward with a commit", edge.forward(step + 1, 0, commit=edge.commit_part(step))
            yield "scale", pb.EdgeMessage(step=step, gradient_scale=0.5)
        for kept in self._kept[:1]:
            yield "weight", pb.EdgeMessage(step=step, weights=[pb.Weight(micro_batch=kept, weight=0.5)])
        for graph, logits in list(self._graphs.items())[:1]:
            shape = tuple(logits.shape)
            yield "backward", edge.backward(step, graph, torch.ones(shape) if shape else torch.zeros(()))
            yield "drop", pb.EdgeMessage(step=step, weights=[pb.Weight(micro_batch=graph, dropped=True)])


def _activation(message: pb.EdgeMessage) -> pb.Activation:
    """Which is empty where the message has none."""
    return message.evaluate.activation if message.HasField("evaluate") else message.forward.activation


def good_run(stub: Any, edge: TinyEdge, steps: int) -> str:
    """A sound session of so many steps; a hash of everything that came back: losses, gradients, weights, optimizer."""
    digest = hashlib.sha256()
    response = stub.OpenSession(edge.request(), timeout=HANG_SECONDS)
    for sha256 in response.missing_blobs:
        content = edge.blobs()[sha256]
        blob = pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content)
        stub.UploadBlob(iter([blob]), timeout=HANG_SECONDS)
    if response.missing_blobs:
        response = stub.OpenSession(edge.request(), timeout=HANG_SECONDS)
    session_id = response.session_id
    outgoing: queue.SimpleQueue[Optional[pb.EdgeMessage]] = queue.SimpleQueue()
    stream = stub.Train(iter(outgoing.get, None), timeout=HANG_SECONDS)
    outgoing.put(attach(session_id))
    next(stream)
    for step in range(steps):
        message = edge.forward(step, commit=edge.commit_part(step - 1) if step else None)
        message.number, message.answered = step + 1, step
        outgoing.put(message)
        answer = next(stream)
        answer.ClearField("cloud_seconds")
        answer.ClearField("stopping")
        digest.update(answer.SerializeToString(deterministic=True))
    for optimizer_state in (False, True):
        request = pb.DownloadWeightsRequest(session_id=session_id, optimizer_state=optimizer_state)
        for part in stub.DownloadWeights(request, timeout=HANG_SECONDS):
            digest.update(part.data)
    outgoing.put(pb.EdgeMessage(close=pb.Close()))
    outgoing.put(None)
    list(stream)
    return digest.hexdigest()
