"""What the audit log says of a call, from the messages that pass."""

from __future__ import annotations

import grpc
from google.protobuf.message import Message

from sft.v1 import split_training_pb2 as pb
from sft_cloud.observability.audit import AuditLog
from sft_cloud.observability.model_name import model_name


class CallRecord:
    """Looks at one call's messages, and writes down what came of them."""

    def __init__(self, audit: AuditLog, method: str, peer: str, who: str = "-") -> None:
        """`who` may be set later: a call may be refused before that is known."""
        self.who = who
        self._audit = audit
        self._method = method
        self._peer = peer
        self._fields: dict[str, object] = {}
        self._opens: pb.OpenSessionRequest | None = None

    def requested(self, message: Message) -> None:
        """A message that came in."""
        if isinstance(message, pb.OpenSessionRequest):
            self._opens = message
            self._fields = {"model": message.model_name or message.cut.layer_name, "split_rank": message.cut.split_rank}
        elif isinstance(message, pb.UploadBlobRequest):
            if message.sha256:
                self._fields = {"sha256": message.sha256, "bytes": message.total_bytes}
        elif isinstance(message, pb.DownloadWeightsRequest):
            self._fields = {"session": _label(message.session_id), "optimizer_state": message.optimizer_state}
        elif isinstance(message, pb.EdgeMessage) and message.WhichOneof("body") == "attach":
            self._fields = {"session": _label(message.attach.session_id)}

    def answered(self, message: Message) -> None:
        """A message that goes out."""
        if isinstance(message, pb.OpenSessionResponse):
            if message.session_id:
                what, step = ("resumed", {"step": message.next_step}) if message.next_step else ("opened", {})
                if self._opens is not None:
                    self._fields["model"] = model_name(self._opens)
                self._write(what, session=_label(message.session_id), **step)
        elif isinstance(message, pb.UploadBlobResponse):
            self._write("uploaded")
        elif isinstance(message, pb.CloudMessage):
            body = message.WhichOneof("body")
            if body == "attached":
                self._write("attached", step=message.attached.next_step)
            elif body == "checkpoint_saved":
                self._write("saved", step=message.checkpoint_saved.id.step)

    def finished(self) -> None:
        """The call got through."""
        if self._method.endswith("/DownloadWeights"):
            self._write("downloaded")

    def refused(self, code: grpc.StatusCode, reason: str) -> None:
        """It did not."""
        self._write("refused", method=self._method, code=code.name, reason=reason)

    def _write(self, what: str, **fields: object) -> None:
        self._audit.write(what, self.who, self._peer, **{**self._fields, **fields})


def _label(session_id: str) -> str:
    # As logs call it: whoever knows all of it could use the session.
    return session_id[:8]
