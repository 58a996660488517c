"""A cloud that `sft-edge doctor` looks at."""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Callable, Dict, Iterator, List

import grpc
from support.scripted_cloud import ScriptedCloud

import sft
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import INSTANCE_KEY, PROTOCOL_VERSION


class ExaminedCloud(ScriptedCloud):
    """A cloud in good health; `status` is what it says of itself, `refuses` how its Status and Probe end."""

    def __init__(self, **status: Any) -> None:
        super().__init__()
        values: Dict[str, Any] = {
            "package_version": sft.__version__,
            "protocol_version": PROTOCOL_VERSION,
            "device": "cuda:0",
            "uptime_seconds": 90.4,
            "caller": "anna",
            "max_sessions": 4,
            "open_sessions": 1,
            "session_timeout_seconds": 600,
        }
        self.status = pb.StatusResponse(**{**values, **status})
        self.ahead_seconds = 0.0
        self.refuses: Dict[str, grpc.StatusCode] = {}
        self.probed: List[int] = []
        self.instances = ["the only one"]
        """Which answers, by turns."""
        self.carried, self.cuts_after = 0, math.inf
        """Bytes that a stream has brought, and after how many `cuts` is called."""
        self.cuts: Callable[[], object] = lambda: None
        self.asked = threading.Event()
        """A message without bytes came."""

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        if "Status" in self.refuses:
            context.abort(self.refuses["Status"], "the token is not known")
        return self.status

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        if "Probe" in self.refuses:
            context.abort(self.refuses["Probe"], "no")
        self.probed.append(max(len(request.data), request.reply_bytes))
        context.set_trailing_metadata(((INSTANCE_KEY, self.instances[len(self.probed) % len(self.instances)]),))
        return pb.ProbeResponse(data=bytes(request.reply_bytes), unix_seconds=time.time() + self.ahead_seconds)

    def Train(
        self, request_iterator: Iterator[pb.EdgeMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.CloudMessage]:
        if "Train" in self.refuses:
            context.abort(self.refuses["Train"], "the first message of a stream must be an attach")
        for message in request_iterator:
            self.carried += len(message.probe.data)
            yield pb.CloudMessage(probed=pb.ProbeResponse())
            if self.carried >= self.cuts_after:
                self.cuts()
            if not message.probe.data:
                self.asked.set()
