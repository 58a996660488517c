"""What the server says of itself, and of its sessions to whom they concern."""

from __future__ import annotations

import time
from collections.abc import Callable

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.protocol import MAX_PROBE_BYTES, PROTOCOL_VERSION
from sft_cloud.engine import missing_features
from sft_cloud.identity import Identity, Limits
from sft_cloud.service.registry import Entry, Registry


class Status:
    """Answers Status and Probe; from any thread, and without the worker, which may be busy for long."""

    def __init__(
        self,
        sessions: Registry,
        device: str,
        is_stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds, for how long the server has been up; `unix_clock`: what edges compare theirs with."""
        self._sessions = sessions
        self._device = device
        self._is_stopping = is_stopping
        self._clock = clock
        self._unix_clock = unix_clock
        self._started_at = clock()

    def status(self, caller: Identity) -> pb.StatusResponse:
        """With the caller's sessions; everybody's where it may see them."""
        entries = self._sessions.entries()
        seen = [entry for entry in entries if caller.sees_all or entry.owner.name == caller.name]
        return pb.StatusResponse(
            package_version=__version__,
            protocol_version=PROTOCOL_VERSION,
            device=self._device,
            unix_seconds=self._unix_clock(),
            uptime_seconds=self._clock() - self._started_at,
            caller=caller.name,
            sessions=[self._session(entry) for entry in seen],
            max_sessions=self._sessions.max_sessions,
            open_sessions=len(entries),
            session_timeout_seconds=self._sessions.session_timeout_seconds,
            token_expires_unix_seconds=caller.expires_unix_seconds or 0.0,
            stopping=self._is_stopping(),
            limits=_limits(caller.limits),
            missing_features=missing_features(),
        )

    def probe(self, request: pb.ProbeRequest) -> pb.ProbeResponse:
        """As many zeros as were asked for. Raises ProtocolError when they, or what came, are too many."""
        began = self._clock()
        if max(len(request.data), request.reply_bytes) > MAX_PROBE_BYTES:
            raise ProtocolError(f"a probe moves at most {MAX_PROBE_BYTES} bytes each way")
        response = pb.ProbeResponse(data=bytes(request.reply_bytes))
        response.unix_seconds = self._unix_clock()
        response.cloud_seconds = self._clock() - began
        return response

    def _session(self, entry: Entry) -> pb.SessionStatus:
        return pb.SessionStatus(
            label=entry.label,
            owner=entry.owner.name,
            model_name=entry.model,
            next_step=entry.next_step,
            age_seconds=self._sessions.age(entry),
            idle_seconds=self._sessions.idle(entry),
            bytes_received=entry.bytes_received,
            bytes_sent=entry.bytes_sent,
            attached=entry.has_edge,
            split_rank=entry.request.cut.split_rank,
            detached=entry.left is not None,
        )


def _limits(limits: Limits) -> pb.CallerLimits:
    return pb.CallerLimits(
        max_sessions=limits.max_sessions or 0,
        max_split_rank=limits.max_split_rank or 0,
        models=limits.models,
        steps_per_second=limits.steps_per_second or 0.0,
        max_bytes_per_day=limits.max_bytes_per_day or 0,
        max_upload_bytes=limits.max_upload_bytes or 0,
        max_memory=limits.max_memory or 0,
    )
