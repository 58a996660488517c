"""How a session is opened: what the cloud lacks is uploaded, and what breaks meanwhile is tried again."""

from __future__ import annotations

from typing import Callable, Mapping

from sft.errors import ProtocolError, ServerFullError, ServerUnavailableError, StaleAccessError
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.answers import check_codecs, check_missing, check_mixed, check_opened
from sft_edge.link.reliable_stream import TRANSIENT
from sft_edge.link.replies import Blob
from sft_edge.link.retries import Retries, RetryPolicy, Wake
from sft_edge.link.transport import SEVERAL_SERVERS, Transport


class Opening:
    """Of one session."""

    def __init__(
        self,
        transport: Transport,
        request: pb.OpenSessionRequest,
        blobs: Mapping[str, Blob],
        policy: RetryPolicy,
        wake: Wake[None],
        on_status: Callable[[str], None],
    ) -> None:
        """As Link has them; `wake` ends a wait."""
        self._transport, self._request, self._blobs = transport, request, blobs
        self._policy = policy
        self._broken = Retries(policy, wake, on_status)
        self._absent = Retries(policy, wake, on_status, policy.wait_seconds)
        self._let_in = False

    def open(self) -> pb.OpenSessionResponse:
        """See Link.open."""
        while True:
            try:
                response = self._try()
                break
            except TRANSIENT as error:
                is_absent = isinstance(error, (ServerUnavailableError, ServerFullError))
                if is_absent and not self._policy.wait_seconds:
                    raise
                if isinstance(error, StaleAccessError) and not self._let_in:
                    raise
                (self._absent if is_absent else self._broken).after(error)
                self._transport.renew()
        self._absent.reset()
        self._broken.reset()
        return response

    def _try(self) -> pb.OpenSessionResponse:
        response = self._transport.open_session(self._request)
        self._let_in = True
        check_codecs(response, self._request)
        check_mixed(response, self._request.optimizer.groups)
        check_missing(response, self._blobs)
        if response.missing_blobs:
            missing = dict.fromkeys(response.missing_blobs)
            self._transport.check_room(sum(self._blobs[sha256].total_bytes for sha256 in missing))
            for sha256 in missing:
                blob = self._blobs[sha256]
                self._transport.upload(sha256, blob.total_bytes, blob.chunks())
            response = self._transport.open_session(self._request)
        if response.missing_blobs and self._transport.several_servers():
            raise ProtocolError(f"what was uploaded is missing again: {SEVERAL_SERVERS}")
        if response.missing_blobs or not response.session_id:
            raise ProtocolError("the cloud neither opened a session nor said what it lacks")
        check_opened(response, {offered.step for offered in self._request.resume_from} or {0})
        return response
