"""The HTTP CONNECT frontend: one connection, one CONNECT, then a splice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, cast

from konnektor.addresses import format_hostport
from konnektor.errors import Code, KonnektorError
from konnektor.frontends.http_connect import BadRequest, ConnectParser, ConnectRequest, response, status_for
from konnektor.scratch import scratch
from konnektor.splice import Splice
from konnektor.stream import Stream

__all__ = ["HttpConnect", "Opener"]

HEAD_TIMEOUT: Final = 10.0
"""Seconds a client has for its request."""
EARLY: Final = 64 * 1024
"""Bytes a client may send before its 200; then it is not read until then."""

Opener = Callable[[ConnectRequest], Awaitable[Stream]]
"""Opens the stream for a request, or raises a KonnektorError that says why not."""

logger: Final = logging.getLogger("konnektor.http")


class HttpConnect(asyncio.BufferedProtocol):
    """The protocol of one client until its tunnel is up.

    A client that goes away while its target is dialed cancels the dial. The 200 is on its way before the first
    byte of the target is written: kube-apiserver gives up when it reads both at once.

    Args:
        opener: routes and opens.
        spawn: runs a coroutine as a task that somebody owns.
    """

    def __init__(
        self, opener: Opener, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._opener = opener
        self._spawn = spawn
        self._parser: ConnectParser | None = ConnectParser()
        self._transport: asyncio.Transport | None = None
        self._early = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._client = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._client = format_hostport(*peer[:2]) if isinstance(peer, tuple) else "a Unix socket"
        self._timer = self._loop.call_later(HEAD_TIMEOUT, self._answer_error, BadRequest(408, "Request Timeout"))

    def get_buffer(self, sizehint: int) -> memoryview:
        return scratch().view[:EARLY]

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(scratch().view[:nbytes])
        if self._parser is None:
            self._early += data
            if len(self._early) >= EARLY and self._transport is not None:
                self._transport.pause_reading()
            return
        try:
            request = self._parser.feed(data)
        except BadRequest as error:
            self._answer_error(error)
            return
        if request is not None:
            self._parser = None
            self._early += request.rest
            self._stop_timer()
            self._task = self._spawn(self._serve(request))

    def eof_received(self) -> bool:
        # No tunnel yet, so nothing can be half-closed: the client gave up.
        return False

    def pause_writing(self) -> None:
        """Only the head of an answer is written here."""

    def resume_writing(self) -> None:
        """See ``pause_writing``."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answer_error(self, error: Exception) -> None:
        self._stop_timer()
        status, phrase = status_for(error)
        logger.info("%s: %d %s: %s", self._client, status, phrase, error)
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(response(status, phrase))
            transport.close()

    async def _serve(self, request: ConnectRequest) -> None:
        target = format_hostport(request.host, request.port)
        try:
            stream = await self._opener(request)
        except KonnektorError as error:
            logger.info("%s: CONNECT %s failed", self._client, target)
            self._answer_error(error)
            return
        except Exception as error:
            logger.exception("%s: CONNECT %s failed inside", self._client, target)
            self._answer_error(error)
            return
        try:
            await self._establish(stream)
        except BaseException:
            stream.reset()
            raise
        logger.debug("%s: CONNECT %s is up", self._client, target)

    async def _establish(self, stream: Stream) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            stream.reset()
            return
        transport.write(response(200))
        # One more turn of the loop sends it; until it is out, what the target says waits in the stream.
        await asyncio.sleep(0)
        while transport.get_write_buffer_size() and not transport.is_closing():
            await asyncio.sleep(0.001)
        if self._transport is None or transport.is_closing():
            stream.reset()
            return
        self._task = None
        joint = Splice(code=Code.CANCELLED)
        transport.set_protocol(joint.local)
        joint.on_connected = lambda _transport: joint.attach(stream.detach())
        joint.connected(transport)
        if self._early:
            joint.local_data(bytes(self._early))
            self._early.clear()
        joint.writable()
