"""Which stream types a side takes, and what serves them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from konnektor.errors import LocalProtocolError
from konnektor.stream import Stream
from konnektor.stream_types import StreamType

__all__ = ["Handlers", "StreamHandler"]

T = TypeVar("T", bound=StreamType)
StreamHandler = Callable[[Stream, Any], Awaitable[None]]


class Handlers:
    """Which stream types a side takes, and what serves them.

    A peer's OPEN of any other type is refused with UNSUPPORTED: nothing is open by default.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[type[StreamType], StreamHandler]] = {}

    def add(self, request: type[T], handler: Callable[[Stream, T], Awaitable[None]]) -> None:
        """Serves streams of a type.

        The handler gets the stream and the request, and must ``accept`` or ``reject``. It runs in a task of
        the session's, cancelled when the opener gives up before an answer, or the session ends.

        Raises:
            ConfigurationError: the type's name is not one.
            LocalProtocolError: the type has a handler.
        """
        request.check()
        if request.name in self._handlers:
            raise LocalProtocolError(f"stream type {request.name!r} has a handler already")
        self._handlers[request.name] = (request, handler)

    def remove(self, request: type[StreamType]) -> None:
        """Serves the type no more."""
        self._handlers.pop(request.name, None)

    def get(self, name: str) -> tuple[type[StreamType], StreamHandler] | None:
        """The type and handler of that name."""
        return self._handlers.get(name)
