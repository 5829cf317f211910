"""The local clients of a control plane, from accept to the last byte: who listens for them, and who is there."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Final

from konnektor.acceptor import Acceptor
from konnektor.addresses import Forward, format_hostport
from konnektor.changes import Changes
from konnektor.connecting import reset_on_close, set_options
from konnektor.errors import ConfigurationError, KonnektorError, SessionClosedError, StreamError
from konnektor.frontends.forward import ForwardSplice
from konnektor.frontends.http_server import HttpConnect, Opener
from konnektor.frontends.udp_forward import UdpForward
from konnektor.frontends.urls import Frontend, HttpFrontend, HttpsFrontend, UnixFrontend, is_loopback
from konnektor.handshake import explain, left_silently, with_alerts
from konnektor.listening import bind_tcp, bind_udp, bind_unix, bound_name
from konnektor.newcomers import Newcomers, Place
from konnektor.reloading import ReloadingContext
from konnektor.session import Session
from konnektor.socket_transport import SocketTransport
from konnektor.stream_types import Tcp, Udp
from konnektor.tls import frontend_context

__all__ = ["Clients"]

TLS_TIMEOUT: Final = 10.0
"""Seconds that a client of an ``https://`` frontend has for its handshake, and for its goodbye once all is sent."""

logger: Final = logging.getLogger("konnektor.clients")


class Clients:
    """Listens for clients, and owns them until they are gone.

    Args:
        opener: opens the stream for a CONNECT.
        session_of: the session of a worker by its name; raises a KonnektorError if there is none.
    """

    def __init__(self, opener: Opener, session_of: Callable[[str], Session]) -> None:
        self._opener = opener
        self._session_of = session_of
        self._closers: list[Callable[[], object]] = []
        """Of what listens."""
        self._contexts: list[ReloadingContext] = []
        self._here: set[asyncio.Transport | SocketTransport] = set()
        self._udp: set[UdpForward] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes: dict[asyncio.Task[None], HttpConnect] = {}
        self._left = False
        self._changes = Changes()

    async def add_forward(self, forward: Forward) -> str:
        """Listens on a local address for one destination; see ``ControlPlane.add_forward``."""
        self._check_here()

        def refused(error: KonnektorError) -> None:
            # Otherwise the worker was not asked, and the text says so.
            asked = isinstance(error, StreamError) and error.refused
            why = f"worker {forward.worker}: {error}" if asked else str(error)
            logger.warning("forward %s: %s", forward, why, extra={"worker": forward.worker})

        choose = partial(self._session_of, forward.worker)
        if forward.protocol == "udp":
            sockets = await bind_udp(forward.listen_host, forward.listen_port)
            return await self._listen_udp(sockets, choose, Udp(forward.host, forward.port), refused)
        request = Tcp(forward.host, forward.port)

        def accepted(sock: socket.SocketType, _address: Any) -> None:
            client = ForwardSplice(choose, request, refused)
            self._add(client, SocketTransport(sock, client.local))

        sockets = await bind_tcp(forward.listen_host, forward.listen_port)
        self._check_here(sockets)
        name = self._set_up(sockets)
        self._closers += [Acceptor(sock, accepted, modest=True, kind=socket.SocketType).close for sock in sockets]
        return name

    async def add_frontend(self, frontend: Frontend) -> str:
        """Serves HTTP CONNECT; see ``ControlPlane.add_frontend``."""
        self._check_here()
        if isinstance(frontend, UnixFrontend):
            return self._listen([bind_unix(frontend.path)])
        context = None
        if isinstance(frontend, HttpsFrontend):
            files = frontend.cert, frontend.key, frontend.client_ca
            context = ReloadingContext(partial(frontend_context, *files), *files, owner=str(frontend))
        sockets = await bind_tcp(frontend.host, frontend.port)
        if isinstance(frontend, HttpFrontend):
            _check_loopback(frontend, sockets)
        name = self._listen(sockets, context)
        if context is not None:
            self._contexts.append(context)
            context.watch()
        return name

    def _check_here(self, sockets: Iterable[socket.socket] = ()) -> None:
        """Raises SessionClosedError, and closes the sockets, after ``leave``: nobody would close them later."""
        if self._left:
            for sock in sockets:
                sock.close()
            raise SessionClosedError("the control plane is closed")

    def _listen(self, sockets: list[socket.socket], context: ReloadingContext | None = None) -> str:
        self._check_here(sockets)
        name = self._set_up(sockets)
        newcomers = Newcomers(sockets, partial(self._heard, context), modest=True)
        # Those that have said nothing can be told the end, but for TLS.
        self._closers.append(partial(newcomers.close, hear=context is None))
        return name

    @staticmethod
    def _set_up(sockets: list[socket.socket]) -> str:
        for sock in sockets:
            if sock.family != socket.AF_UNIX:
                # For every client at once: what a listening socket has, the kernel gives to those that it accepts.
                set_options(sock)
        return bound_name(sockets[0])

    async def _listen_udp(
        self,
        sockets: list[socket.socket],
        choose: Callable[[], Session],
        request: Udp,
        refused: Callable[[KonnektorError], None],
    ) -> str:
        self._check_here(sockets)
        name = bound_name(sockets[0])
        while sockets:
            forward = UdpForward(sockets.pop(0), choose, request, refused, self._closed_udp)
            self._udp.add(forward)
            try:
                await forward.open()
            except BaseException:
                for sock in sockets:
                    sock.close()
                raise
            if self._left:
                forward.close()  # it could not be closed before it was open
            self._check_here(sockets)
        return name

    def _closed_udp(self, forward: UdpForward) -> None:
        self._udp.discard(forward)
        self._changes.notify()

    def _heard(self, context: ReloadingContext | None, sock: socket.socket, address: Any, place: Place) -> None:
        client = HttpConnect(self._opener, partial(self._asked, place))
        if context is None:
            self._add(client, SocketTransport(sock, client), place)
            return
        peer = f"the client at {format_hostport(*address[:2])}"
        task = self._spawn(self._secure(client, context, sock, peer, place))
        self._handshakes[task] = client
        task.add_done_callback(partial(self._secured, sock, place))

    def _asked(self, place: Place, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The client has said what it wants, and this serves it."""
        place.leave()
        return self._spawn(coroutine)

    def _add(
        self,
        client: HttpConnect | ForwardSplice,
        transport: asyncio.Transport | SocketTransport,
        place: Place | None = None,
    ) -> None:
        self._here.add(transport)
        client.on_closed = partial(self._gone, transport, place)

    def _gone(self, transport: asyncio.Transport | SocketTransport, place: Place | None) -> None:
        self._here.discard(transport)
        if place is not None:
            place.leave()
        self._changes.notify()

    async def _secure(
        self, client: HttpConnect, context: ReloadingContext, sock: socket.socket, peer: str, place: Place
    ) -> None:
        """The TLS handshake of a client, or one line that says why not."""
        loop = asyncio.get_running_loop()
        tls = with_alerts(context.get(), sock)
        try:
            await loop.connect_accepted_socket(
                lambda: client,
                sock,
                ssl=tls,
                ssl_handshake_timeout=TLS_TIMEOUT,
                ssl_shutdown_timeout=TLS_TIMEOUT,
            )
        except OSError as error:
            if left_silently(tls, error):
                logger.debug("%s left without having sent anything", peer)
            else:
                logger.warning("refused a connection: %s", explain(error, peer))
            return
        if client.transport is not None:
            self._add(client, client.transport, place)

    def _secured(self, sock: socket.socket, place: Place, task: asyncio.Task[None]) -> None:
        """Closes the socket of a handshake that failed, or that was cancelled."""
        client = self._handshakes.pop(task)
        if client.on_closed is not None:  # it is here
            return
        place.leave()
        if client.transport is not None:  # it was through at that very moment
            client.transport.abort()
        else:
            sock.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # The end

    def leave(self) -> None:
        """Takes no more clients, and tells those that have not asked for anything yet."""
        self._left = True
        for close in self._closers:
            close()
        for context in self._contexts:
            context.stop()
        for transport in list(self._here):
            protocol = transport.get_protocol()
            if isinstance(protocol, HttpConnect):
                protocol.leave()
        for client in self._handshakes.values():
            client.leave()
        for forward in list(self._udp):
            forward.leave()

    def abort(self) -> None:
        """Drops every client, so that none of them takes it for the end of what it was reading."""
        for transport in list(self._here):
            sock = transport.get_extra_info("socket")
            if sock is not None:  # asyncio's TLS has none any more in the turn before it says that the client is gone
                reset_on_close(sock)
            transport.abort()
        for forward in list(self._udp):
            forward.close()
        for task in self._tasks:
            task.cancel()

    async def wait_closed(self) -> None:
        """Waits until every client is gone, but for those that are in their TLS handshakes: they go. Cancelling is safe."""
        for task in self._handshakes:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._changes.wait_for(lambda: not self._here and not self._udp)


def _check_loopback(frontend: HttpFrontend, sockets: list[socket.socket]) -> None:
    """``localhost`` is what /etc/hosts makes of it.

    Raises:
        ConfigurationError: an address can be reached from elsewhere; the sockets are closed.
    """
    for sock in sockets:
        host = sock.getsockname()[0]
        if not is_loopback(host):
            for each in sockets:
                each.close()
            raise ConfigurationError(
                f"frontend {frontend} would serve anyone in plaintext, because {frontend.host} is {host} here: write "
                "127.0.0.1 or [::1]"
            )
