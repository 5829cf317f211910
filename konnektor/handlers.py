"""Which stream types a side takes, and what serves them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from konnektor.errors import ConfigurationError, LocalProtocolError
from konnektor.mux import MuxStream
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, check_type

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["Entry", "Handlers", "StreamHandler"]

T = TypeVar("T", bound=StreamType)
StreamHandler = Callable[[Stream, Any], Awaitable[None]]


class Entry(NamedTuple):
    """What serves a type."""

    request: type[StreamType]
    handler: StreamHandler
    begin: Callable[[Session, MuxStream, Any], bool] | None = None


class Handlers:
    """Which stream types a side takes, and what serves them.

    A peer's OPEN of any other type is refused with UNSUPPORTED: nothing is open by default.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Entry] = {}

    def add(
        self,
        request: type[T],
        handler: Callable[[Stream, T], Awaitable[None]],
        begin: Callable[[Session, MuxStream, T], bool] | None = None,
    ) -> None:
        """Serves streams of a type.

        The handler gets the stream and the request, and must ``accept`` or ``reject``. It runs in a task of
        the session's, cancelled when the opener gives up before an answer, or the session ends.

        Args:
            request: the type.
            handler: what serves its streams, a coroutine function.
            begin: asked first, without a task. Where it returns True it has taken every duty over, the stream's sink
                and its ``release`` included; else the handler serves the stream, of which nothing has been touched.

        Raises:
            ConfigurationError: the type is none, or its name, or the handler is no coroutine function.
            LocalProtocolError: the type has a handler.
        """
        check_type(request)
        _check_handler(request, handler)
        if request.name in self._handlers:
            raise LocalProtocolError(f"stream type {request.name!r} has a handler already")
        self._handlers[request.name] = Entry(request, handler, begin)

    def remove(self, request: type[StreamType]) -> None:
        """Serves the type no more."""
        self._handlers.pop(request.name, None)

    def get(self, name: str) -> Entry | None:
        """What serves the type of that name."""
        return self._handlers.get(name)


def _check_handler(request: type[StreamType], handler: object) -> None:
    """Raises ConfigurationError for what would give nothing to wait for, which only the first stream would show."""
    function = inspect.unwrap(handler) if callable(handler) else None
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    # What else is callable may well return an awaitable: an object, a compiled function, a lambda around a coroutine.
    plain = isinstance(function, FunctionType) and function.__name__ != "<lambda>"
    if function is None or (plain and not inspect.iscoroutinefunction(function)):
        raise ConfigurationError(
            f"the handler of {request.__name__} is not a coroutine function: write async def serve(stream, request)"
        )
