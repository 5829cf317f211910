"""The HTTP CONNECT frontend: one connection, one CONNECT, then a splice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, cast

from konnektor.addresses import format_hostport
from konnektor.errors import CertificateError, Code, KonnektorError
from konnektor.frontends.http_connect import BadRequest, ConnectParser, ConnectRequest, response, status_for
from konnektor.scratch import scratch
from konnektor.splice import Splice
from konnektor.stream import Stream
from konnektor.tls import check_frontend_client

__all__ = ["HttpConnect", "Opener"]

HEAD_TIMEOUT: Final = 10.0
"""Seconds a client has for its request."""
EARLY: Final = 64 * 1024
"""Bytes a client may send before its 200; then it is not read until then."""
LINGER: Final = 2.0
"""Seconds that a client which is refused has to read why, and to close."""

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

    Attributes:
        on_closed: called once, when the connection is over, tunnel included.
        transport: of the connection, None before and after.
    """

    def __init__(self, opener: Opener, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._opener = opener
        self._spawn = spawn
        self._parser: ConnectParser | None = ConnectParser()
        self._early = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._client = ""
        self._answered = False
        self._refused = False
        self._half_closed = False
        self._leaving = False
        self.on_closed: Callable[[], object] | None = None
        self.transport: asyncio.Transport | None = None

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._client = format_hostport(*peer[:2]) if isinstance(peer, tuple) else "a local client"
        self._timer = self._loop.call_later(HEAD_TIMEOUT, self._refuse, BadRequest(408, "Request Timeout"))
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is not None:
            # Not in the handshake: under TLS 1.3 the client is through by now, and an answer tells it more than an alert.
            try:
                check_frontend_client(ssl_object)
            except CertificateError as error:
                self._refuse(error)
        if self._leaving:
            self.leave()

    def get_buffer(self, sizehint: int) -> memoryview:
        return scratch().view[:EARLY]

    def buffer_updated(self, nbytes: int) -> None:
        if self._refused:
            return
        data = bytes(scratch().view[:nbytes])
        if self._parser is None:
            self._early += data
            if len(self._early) >= EARLY and self.transport is not None:
                self.transport.pause_reading()
            return
        try:
            request = self._parser.feed(data)
        except BadRequest as error:
            self._refuse(error)
            return
        if request is not None:
            self._parser = None
            self._early += request.rest
            self._stop_timer()
            self._task = self._spawn(self._serve(request))

    def eof_received(self) -> bool:
        # Before the 200 nothing can be half-closed: the client gave up. After it, the tunnel will be told, which
        # finds out whether TLS vouches for that end.
        self._half_closed = self._answered
        # TLS cannot be half-closed, whatever is said here, and asyncio logs a warning about who asks for it.
        return self._answered and self.transport is not None and self.transport.can_write_eof()

    def pause_writing(self) -> None:
        """Only the head of an answer is written here."""

    def resume_writing(self) -> None:
        """See ``pause_writing``."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
        if self.on_closed is not None:
            self.on_closed()

    # What becomes of a request

    def leave(self) -> None:
        """The frontend takes no more requests; one that is here is served. Before its TLS handshake, it is told after it."""
        self._leaving = True
        if self._parser is not None and self.transport is not None:
            self._refuse(BadRequest(503, "Shutting Down"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: Exception, target: str = "") -> None:
        self._stop_timer()
        status, phrase = status_for(error)
        what = f"CONNECT {target}" if target else "a request"
        worker = error.worker if isinstance(error, KonnektorError) else ""
        # What came of a bad request is in the phrase already.
        why = "" if isinstance(error, BadRequest) else f" ({worker and f'worker {worker}: '}{error})"
        logger.warning("refused %s %s: %d %s%s", self._client, what, status, phrase, why, extra={"worker": worker})
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self._refused, self._parser = True, None
        transport.write(response(status, phrase))
        if transport.can_write_eof():
            # What the client still sends is read and dropped: unread, it would make the kernel reset the connection,
            # and the answer would be lost (RFC 9112 section 9.6).
            transport.write_eof()
            transport.resume_reading()
            self._timer = self._loop.call_later(LINGER, transport.abort)
        else:  # TLS, which says goodbye by itself
            transport.close()

    async def _serve(self, request: ConnectRequest) -> None:
        target = format_hostport(request.host, request.port)
        try:
            stream = await self._opener(request)
        except Exception as error:
            if not isinstance(error, KonnektorError):
                logger.exception("internal error")
            self._refuse(error, target)
            return
        try:
            await self._establish(stream)
        except BaseException:
            stream.reset()
            raise
        worker = stream.session.peer_name
        logger.debug("%s: CONNECT %s is up, by worker %s", self._client, target, worker, extra={"worker": worker})

    async def _establish(self, stream: Stream) -> None:
        transport = self.transport
        assert transport is not None  # else this task would be cancelled
        self._answered = True
        transport.write(response(200))
        # Until the 200 is with the kernel, and for one more turn of the loop, the target's bytes wait in the stream.
        await asyncio.sleep(0)
        while transport.get_write_buffer_size() and not transport.is_closing():  # noqa: ASYNC110 - once in a blue moon
            await asyncio.sleep(0.001)
        # From here on nothing awaits.
        self._task = None
        if transport.is_closing():
            stream.reset()
            return
        joint = Splice(code=Code.CANCELLED, on_closed=self.on_closed)
        transport.set_protocol(joint.local)
        joint.on_connected = lambda _transport: joint.attach(stream.detach())
        joint.connected(transport)
        if self._early:
            joint.local_data(bytes(self._early))
        if self._half_closed:
            if not joint.local_eof():
                transport.close()
        else:
            joint.writable()
