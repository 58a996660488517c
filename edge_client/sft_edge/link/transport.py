"""The seam between the link and the network: what is above it can be tested without a socket.

Messages of the training stream cross it serialized. The link counts their bytes, and asking a protobuf message for its
size costs as much as serializing it once more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Iterator

from sft.v1 import split_training_pb2 as pb

SEVERAL_SERVERS = (
    "calls reach different servers, and a session lives in one: give each server an address of its own, or have the "
    "proxy keep an edge on one (docs/proxies.md)"
)


class Stream(ABC):
    """The cloud's side of an open training stream: iterate for serialized `CloudMessage`s, in the order sent.

    The iteration ends when the cloud has ended the stream properly. It raises a LinkError when the stream broke:
    StreamBrokenError, ServerUnavailableError and ServerFullError where another stream may go on with the session,
    SessionLostError where there is none any more, ProtocolError and AccessError where the cloud refuses.
    """

    def __iter__(self) -> Iterator[bytes]:
        return self

    @abstractmethod
    def __next__(self) -> bytes:
        """Waits for the next message."""

    @abstractmethod
    def cancel(self) -> None:
        """Breaks the stream off; whoever iterates gets StreamBrokenError. Harmless when it has ended."""


class Transport(ABC):
    """A way to one cloud. Its methods raise classes of LinkError, and what an iterator given to them raises.

    State on the cloud changes in `open_session` and with the messages of `stream`. Opening with the same request_id
    again, or uploading a blob twice, changes nothing, nor does downloading.
    """

    @abstractmethod
    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        """Asks for a session.

        Raises ServerUnavailableError (nobody answers, or nobody of ours), StreamBrokenError, ServerFullError,
        AccessError, or ProtocolError (another version, or a request that the cloud refuses, such as one to continue
        from checkpoints of which the cloud holds none).
        """

    @abstractmethod
    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        """Stores a blob on the cloud; `chunks` are together `total_bytes` long and have the hash `sha256`.

        Raises StreamBrokenError when the way broke; it may be tried again.
        """

    @abstractmethod
    def stream(self, messages: Iterator[bytes]) -> Stream:
        """Opens the training stream. `messages` yields serialized `EdgeMessage`s; it may block, and its end ends the
        stream properly. It is iterated in another thread."""

    @abstractmethod
    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        """Net_2's parameters, or the state of its optimizer, as they are now: the bytes of one safetensors file.

        `offset`: so many of its first bytes are left out. Raises StreamBrokenError when the way broke; it may be tried
        again.
        """

    def check_session(self, session_id: str) -> None:
        """After a stream that broke before it had the session: there are proxies that lose why. Raises SessionLostError
        where the cloud says that it has no such session; nothing where it does not answer."""
        return

    def check_carries(self, total_bytes: int) -> None:
        """After streams that broke when they had sent so much. Raises ProtocolError where a proxy on the way takes no
        such call, and says so."""
        return

    def several_servers(self) -> bool:
        """Whether calls reach one server now and another then, as far as can be found out: for who was told that what
        an earlier call has brought is not there."""
        return False

    def check_room(self, total_bytes: int) -> None:
        """Before so many bytes are uploaded. Raises UsageError where the run may not move them."""
        return

    def check_again(self, total_bytes: int, steps: int) -> None:
        """Before a stream is opened in the place of one that broke: so many bytes are to be sent again, and the answers
        to so many steps are due. Raises SessionLostError where the run may not move them."""
        return

    def has_held(self, seconds: float) -> bool:
        """Whether something that was to be sent had to wait here within so many seconds, as the link is not to be used
        faster: an answer that is late then says nothing."""
        return False

    @abstractmethod
    def renew(self) -> None:
        """What was known of the way is forgotten: the next call dials anew, with names looked up and files of secrets
        read again. Breaks off what is under way."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the transport holds and breaks off what is under way. Idempotent."""
