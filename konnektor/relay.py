"""Relay between any two anyio byte streams, with two tasks; ``splice`` is for a stream and a socket, and faster."""

from __future__ import annotations

import anyio
import anyio.abc

__all__ = ["relay"]


async def relay(a: anyio.abc.ByteStream, b: anyio.abc.ByteStream) -> None:
    """Copies both ways until both have finished; the end of one direction leaves the other open.

    A side that takes no more, while what it sends is still coming, ends its direction only: so an answer arrives whole
    though its sender did not wait for the rest of the request. A side that knows no half-close (TLS) ends both.

    Leaves both streams for the caller to close. Cancelling is safe; bytes that were being passed on are lost then.

    Raises:
        anyio.BrokenResourceError: a side broke (a ``PeerError`` where it is a konnektor stream). Never an ExceptionGroup.
    """
    failures: list[Exception] = []

    async def copy(source: anyio.abc.ByteReceiveStream, sink: anyio.abc.ByteStream) -> None:
        sending = False
        try:
            async for chunk in source:
                sending = True
                await sink.send(chunk)
                sending = False
            await sink.send_eof()
        except NotImplementedError:
            group.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001
            # Where the sink is really broken, and not only finished with us, receiving from it fails as well.
            if not (sending and isinstance(error, anyio.BrokenResourceError | OSError)):
                failures.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(copy, a, b)
        group.start_soon(copy, b, a)
    if failures:
        raise failures[0]
