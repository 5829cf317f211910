"""Relay between any two anyio byte streams, with two tasks; ``splice`` is for a stream and a socket, and faster."""

from __future__ import annotations

import anyio
import anyio.abc

__all__ = ["relay"]


async def relay(a: anyio.abc.ByteStream, b: anyio.abc.ByteStream) -> None:
    """Copies both ways until both have finished; the end of one direction leaves the other open.

    Leaves both streams for the caller to close. Cancelling is safe; bytes that were being passed on are lost then.

    Raises:
        anyio.BrokenResourceError: a side broke (a ``PeerError`` where it is a konnektor stream). Never an ExceptionGroup.
    """
    failures: list[Exception] = []

    async def copy(source: anyio.abc.ByteReceiveStream, sink: anyio.abc.ByteStream) -> None:
        try:
            async for chunk in source:
                await sink.send(chunk)
            await sink.send_eof()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(copy, a, b)
        group.start_soon(copy, b, a)
    if failures:
        raise failures[0]
