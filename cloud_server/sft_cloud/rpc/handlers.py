"""A gRPC handler of the same kind around another: the four kinds are spelled out here alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_KINDS: dict[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""By whether requests, and whether answers, are a stream."""


def behaviour_of(handler: Handler) -> Callable[[Any, Any], Any]:
    """What it does with a request, or an iterator of them, and a context."""
    behaviour: Callable[[Any, Any], Any] = getattr(handler, _KINDS[_kind(handler)][0])
    return behaviour


class _Here(ThreadPoolExecutor):
    """Runs what it is given at once."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


_HERE = _Here(1)


def at_once(
    behaviour: Callable[[Any, Any], Any], threads: ThreadPoolExecutor | None = None
) -> Callable[[Any, Any], Any]:
    """Has it run on the thread on which gRPC tells of the call, or where `threads` has it run: it takes none of those
    that known callers need.

    For what strangers can have done. It must neither wait nor read.
    """

    def run(request: Any, context: Any) -> Any:
        return behaviour(request, context)

    run.experimental_thread_pool = _HERE if threads is None else threads  # type: ignore[attr-defined]  # gRPC's name for it
    return run


def remade(
    handler: Handler, one_answer: Callable[[Any, Any], Any], many_answers: Callable[[Any, Any], Iterator[Any]]
) -> Handler:
    """A handler of the same kind that does one of the two instead."""
    kind, made_of = _kind(handler), many_answers if handler.response_streaming else one_answer
    threads = getattr(behaviour_of(handler), "experimental_thread_pool", None)
    if threads is not None:
        made_of = at_once(made_of, threads)
    made: Handler = _KINDS[kind][1](
        made_of,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made


def raw(
    handler: Handler, one_answer: Callable[[Any, Any], bytes], many_answers: Callable[[Any, Any], Iterator[list[bytes]]]
) -> Handler:
    """A handler that takes a stream of bytes, whatever the other takes, and gives as many answers, of bytes.

    Each of several comes in a list, out of which it is taken when it is sent: gRPC keeps hold of what a stream has
    given last until it gives the next, which may be never.
    """
    if handler.response_streaming:
        made: Handler = _KINDS[True, True][1](many_answers, response_serializer=list.pop)
    else:
        made = _KINDS[True, False][1](one_answer)
    return made


def around(handler: Handler, block: Callable[[Any], AbstractContextManager[Any]]) -> Handler:
    """A handler of the same kind in a block that is left after the last answer; `block` takes a call's context, and
    gives that which the handler sees.
    """
    behaviour = behaviour_of(handler)

    def one_answer(request: Any, context: Any) -> Any:
        with block(context) as inner:
            return behaviour(request, inner)

    def many_answers(request: Any, context: Any) -> Iterator[Any]:
        with block(context) as inner:
            yield from behaviour(request, inner)

    return remade(handler, one_answer, many_answers)


def _kind(handler: Handler) -> tuple[bool, bool]:
    return handler.request_streaming, handler.response_streaming
