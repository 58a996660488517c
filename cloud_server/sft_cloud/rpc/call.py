"""What every call has from its beginning: a caller, who is found out once, and a status for whatever goes wrong."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sft.wire.protocol import INSTANCE_KEY
from sft_cloud.identity import Identity
from sft_cloud.rpc.handlers import Handler, around
from sft_cloud.rpc.status_codes import ends_call

Identify = Callable[[grpc.ServicerContext], Identity]
"""Finds out who calls. Raises UnauthenticatedError."""


class Call:
    """gRPC's context of a call, which it is in all else, with the caller."""

    def __init__(self, context: grpc.ServicerContext, identify: Identify) -> None:
        self._context = context
        self._identify = identify
        self._caller: Identity | None = None

    @property
    def caller(self) -> Identity:
        """Who calls, as known when this was first asked for. Raises UnauthenticatedError."""
        if self._caller is None:
            self._caller = self._identify(self._context)
        return self._caller

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class CallInterceptor(grpc.ServerInterceptor):
    """Stands before all others: what is behind it gets a Call for a context, and has only to raise."""

    def __init__(self, identify: Identify) -> None:
        self._identify = identify
        self._ends_with = ((INSTANCE_KEY, secrets.token_hex(8)),)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        return None if handler is None else around(handler, self._call)

    @contextmanager
    def _call(self, context: grpc.ServicerContext) -> Iterator[Call]:
        context.set_trailing_metadata(self._ends_with)
        with ends_call(context):
            yield Call(context, self._identify)
