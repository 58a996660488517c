"""A transport without sockets: one session of the real cloud, in this process, and no thread but the link's own."""

from __future__ import annotations

from collections import deque
from typing import Deque, Iterator, Optional, Sequence

import torch

from sft.errors import SessionLostError, StreamBrokenError
from sft.tensors.stream import StoredTensor, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.errors import GapError
from sft_cloud.service.exactly_once import ExactlyOnce
from sft_cloud.session.session import Session
from sft_edge.link.transport import Stream, Transport

_CPU = torch.device("cpu")


class InMemoryTransport(Transport):
    """Calls a session's methods. What net_2 starts from is given, so nothing is ever uploaded."""

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self.session: Optional[Session] = None
        self.messages = ExactlyOnce()
        self._tensors = tensors

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        spec = check_request(request)
        self.session = make_session(spec, build(spec, _CPU), self._tensors, _CPU)
        return pb.OpenSessionResponse(session_id="in memory", device="cpu")

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        raise AssertionError("no cloud asked for it")

    def stream(self, messages: Iterator[bytes]) -> Stream:
        return _InMemoryStream(self._opened(), self.messages, messages)

    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        session = self._opened()
        stored = session.stored_optimizer_state() if optimizer_state else session.stored_parameters()
        return iter([b"".join(safetensors_chunks(stored))[offset:]])

    def renew(self) -> None:
        pass

    def close(self) -> None:
        self.session = None

    def _opened(self) -> Session:
        if self.session is None:
            raise SessionLostError("there is no session")
        return self.session


class _InMemoryStream(Stream):
    def __init__(self, session: Session, numbered: ExactlyOnce, messages: Iterator[bytes]) -> None:
        self._session = session
        self._numbered = numbered
        self._messages = messages
        self._answers: Deque[pb.CloudMessage] = deque()
        self._cancelled = False

    def __next__(self) -> bytes:
        if not self._answers:
            data = next(self._messages)
            if self._cancelled:
                raise StreamBrokenError("the stream was broken off")
            self._take(pb.EdgeMessage.FromString(data))
        return self._answers.popleft().SerializeToString()

    def _take(self, message: pb.EdgeMessage) -> None:
        if message.HasField("close"):
            next(self._messages, None)
            raise StopIteration
        if message.HasField("attach"):
            attached = pb.Attached(next_step=self._session.next_step, last_number=self._numbered.last_number)
            self._answers.append(pb.CloudMessage(attached=attached))
            self._answers.extend(self._numbered.answers_after(message.answered))
        else:
            try:
                answer, _ = self._numbered.apply(message, lambda: self._session.handle(message))
            except GapError as error:
                raise StreamBrokenError(str(error)) from error
            self._answers.append(answer)

    def cancel(self) -> None:
        self._cancelled = True
