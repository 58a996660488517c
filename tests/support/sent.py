"""What edges send to the servers of this process, as these take it from gRPC: messages, metadata, configurations."""

from __future__ import annotations

import json
from typing import Any, Callable

import grpc
import pytest

from sft.v1 import split_training_pb2 as pb

_REQUESTS = {
    "OpenSession": pb.OpenSessionRequest,
    "UploadBlob": pb.UploadBlobRequest,
    "Train": pb.EdgeMessage,
    "DownloadWeights": pb.DownloadWeightsRequest,
    "Status": pb.StatusRequest,
    "Probe": pb.ProbeRequest,
}


class Sent(grpc.ServerInterceptor):
    """Of every server that is started while it is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[tuple[str, bytes]] = []
        """Method and bytes, in the order in which they came."""
        self.metadata: dict[str, set[str]] = {}
        """Values by key."""
        server = grpc.server

        def made(*args: Any, interceptors: Any = (), **kwargs: Any) -> grpc.Server:
            return server(*args, interceptors=[self, *interceptors], **kwargs)

        monkeypatch.setattr(grpc, "server", made)

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        method = details.method.rpartition("/")[2]
        for key, value in details.invocation_metadata:
            self.metadata.setdefault(key, set()).add(str(value))
        handler = continuation(details)
        if handler is None:
            return None
        read = handler.request_deserializer

        def recorded(data: bytes) -> Any:
            self.messages.append((method, data))
            return data if read is None else read(data)

        return handler._replace(request_deserializer=recorded)

    def parsed(self) -> list[Any]:
        return [_REQUESTS[method].FromString(data) for method, data in self.messages if method in _REQUESTS]

    def fields(self) -> set[str]:
        """`Message.field` of every field that was set in any message."""
        found: set[str] = set()
        for message in self.parsed():
            _walk(message, found)
        return found

    def settings(self) -> set[str]:
        """The keys of every `config_json`."""
        texts = {message.config_json for message in self.parsed() if isinstance(message, pb.OpenSessionRequest)}
        return {key for text in texts if text for key in json.loads(text)}

    def all_bytes(self) -> bytes:
        return b"\n".join([*(data for _, data in self.messages), *(str(self.metadata).encode(),)])


def _walk(message: Any, found: set[str]) -> None:
    for field, value in message.ListFields():
        found.add(f"{message.DESCRIPTOR.name}.{field.name}")
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            value = [one for one in value.values() if hasattr(one, "ListFields")]
        for one in [value] if hasattr(value, "ListFields") else value:
            _walk(one, found)
