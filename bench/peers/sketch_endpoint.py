"""One end of the sketch: ``python -m bench.peers.sketch_endpoint control-plane|worker CA CERT KEY TUNNEL OTHERS``.

The worker's TUNNEL is a port to listen on, and OTHERS are the targets, HOST:PORT; the control plane's is the worker's HOST:PORT,
and OTHERS are ports to listen on, in the order of the targets.

Frames with a header of eight bytes over one TLS connection, and one write for each turn of the loop. A stream that nobody
reads stops all of them, nothing is fair, bounded or sent again, and whatever the peer says is believed.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import struct
from typing import Any

from bench.peers.relay import run_end
from konnektor.acceptor import Acceptor
from konnektor.listening import bind_tcp
from konnektor.scratch import scratch
from konnektor.socket_transport import SocketTransport

HEADER = struct.Struct(">II")
"""The stream, then the kind in eight bits and the length of what follows in 24."""
DATA, OPEN, FIN, RESET = 0, 1 << 24, 2 << 24, 3 << 24
LENGTH = (1 << 24) - 1
HIGH = 256 * 1024


class Tunnel(asyncio.BufferedProtocol):
    """The TLS connection, and the local sockets by the number of their stream."""

    def __init__(self, targets: list[tuple[str, int]]) -> None:
        self.targets = targets
        self.transport: Any = None
        self.locals: dict[int, Local] = {}
        self.streams = 0
        self._blocking: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.set_write_buffer_limits(HIGH)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pause_writing(self) -> None:
        for local in self.locals.values():
            local.transport.pause_reading()

    def resume_writing(self) -> None:
        for local in self.locals.values():
            local.transport.resume_reading()

    def block(self, stream: int) -> None:
        """A socket takes no more: nothing is read until it does, whoever it is for."""
        if not self._blocking:
            self.transport.pause_reading()
        self._blocking.add(stream)

    def unblock(self, stream: int) -> None:
        if stream in self._blocking:
            self._blocking.remove(stream)
            if not self._blocking:
                self.transport.resume_reading()

    def frame(self, stream: int, kind: int, payload: bytes = b"") -> None:
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
        out.append(HEADER.pack(stream, kind | len(payload)))
        if payload:
            out.append(payload)

    def _flush(self) -> None:
        out = b"".join(self._out)
        self._out.clear()
        self.transport.write(out)

    def get_buffer(self, sizehint: int) -> memoryview:
        rest = self._rest
        view = scratch().view
        if rest:
            view[: len(rest)] = rest
            return view[len(rest) :]
        return view

    def buffer_updated(self, nbytes: int) -> None:
        view = scratch().view
        size = len(self._rest) + nbytes
        at = 0
        locals_, unpack = self.locals, HEADER.unpack_from
        while size - at >= 8:
            stream, meta = unpack(view, at)
            end = at + 8 + (meta & LENGTH)
            if end > size:
                break
            if meta <= LENGTH:
                local = locals_.get(stream)
                if local is not None:
                    local.transport.write(view[at + 8 : end])
            else:
                self._control(stream, meta & ~LENGTH, bytes(view[at + 8 : end]))
            at = end
        self._rest = bytes(view[at:size]) if at < size else b""

    def _control(self, stream: int, kind: int, payload: bytes) -> None:
        if kind == OPEN:
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect_ex(self.targets[payload[0]])
            self.add(stream, sock)
        elif (local := self.locals.get(stream)) is not None:
            local.end(kind)

    def add(self, stream: int, sock: socket.socket) -> None:
        local = self.locals[stream] = Local(self, stream)
        SocketTransport(sock, local)


class Local(asyncio.Protocol):
    """A socket of a client's, or to a target."""

    __slots__ = ("_fin_sent", "_fin_taken", "_stream", "_tunnel", "transport")

    def __init__(self, tunnel: Tunnel, stream: int) -> None:
        self._tunnel = tunnel
        self._stream = stream
        self._fin_sent = self._fin_taken = False
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._tunnel.frame(self._stream, DATA, data)

    def eof_received(self) -> bool:
        self._tunnel.frame(self._stream, FIN)
        self._fin_sent = True
        return not self._fin_taken

    def pause_writing(self) -> None:
        self._tunnel.block(self._stream)

    def resume_writing(self) -> None:
        self._tunnel.unblock(self._stream)

    def end(self, kind: int) -> None:
        if kind == RESET:
            self.transport.abort()
        elif self._fin_sent:
            self.transport.close()
        else:
            self._fin_taken = True
            self.transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        del self._tunnel.locals[self._stream]
        self._tunnel.unblock(self._stream)
        if not (self._fin_sent or self._fin_taken):
            self._tunnel.frame(self._stream, RESET)


async def relay(role: str, context: ssl.SSLContext, args: list[str]) -> None:
    tunnel, *others = args
    _kept = await (serve if role == "worker" else forward)(context, tunnel, others)
    gc.freeze()
    await asyncio.Event().wait()


async def serve(context: ssl.SSLContext, port: str, targets: list[str]) -> list[Acceptor]:
    """The worker: a stream goes to the target whose number its OPEN says."""
    parsed = [(host, int(target)) for host, _, target in (address.rpartition(":") for address in targets)]
    await asyncio.get_running_loop().create_server(lambda: Tunnel(parsed), "127.0.0.1", int(port), ssl=context)
    return []


async def forward(context: ssl.SSLContext, address: str, ports: list[str]) -> list[Acceptor]:
    """The control plane: each client is a stream."""
    host, _, port = address.rpartition(":")
    _, tunnel = await asyncio.get_running_loop().create_connection(
        lambda: Tunnel([]), host, int(port), ssl=context, server_hostname="cp"
    )

    def accept(number: int, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tunnel.streams += 1
        tunnel.frame(tunnel.streams, OPEN, bytes([number]))
        tunnel.add(tunnel.streams, sock)

    return [
        Acceptor(sock, lambda sock, _address, number=number: accept(number, sock))
        for number, local in enumerate(ports)
        for sock in await bind_tcp("127.0.0.1", int(local))
    ]


if __name__ == "__main__":
    run_end(relay)
