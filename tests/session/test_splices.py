"""Splices of streams and sockets: every end in every order, backpressure, and many at once."""

import asyncio
import contextlib
import errno
import gc
import itertools
import logging
import random
import resource
import socket
import struct
import threading
import time
from contextlib import asynccontextmanager
from importlib import import_module

import anyio
import pytest

import konnektor as kk
from konnektor import loop_transport
from konnektor.errors import StreamClosedError
from konnektor.frames import Data
from konnektor.inbox import Inbox
from konnektor.limits import MIB
from konnektor.mux import PAYLOAD
from konnektor.socket_transport import SocketTransport
from konnektor.splice import GATHERED, QUEUE_HIGH, Splice, join, splice
from konnektor.stream_types import Tcp
from tests.pair import Pair
from tests.session.check_stream import exactly, until_end
from tests.session.pairs import memory_session_pair, memory_stream_pair, segments_sent, tcp_socketpair

RST = struct.pack("ii", 1, 0)


def unix_socketpair():
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a, b


@pytest.fixture(params=[tcp_socketpair, unix_socketpair], ids=["tcp", "unix"])
def sockets(request):
    return request.param


async def until(condition):
    while not condition():
        await anyio.sleep(0.002)


async def recv(sock, size=65_536):
    return await asyncio.get_running_loop().sock_recv(sock, size)


async def sendall(sock, data):
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def recv_all(sock):
    received = bytearray()
    while chunk := await recv(sock):
        received += chunk
    return bytes(received)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
    sock.close()


@asynccontextmanager
async def half(sockets, **kwargs):
    """A stream, whose other end is spliced to a socket, and that socket's other end."""
    async with memory_stream_pair() as (a, b):
        outer, inner = sockets()
        ended = asyncio.Event()
        await splice(b, inner, on_closed=ended.set, **kwargs)
        try:
            yield a, outer, ended
        finally:
            outer.close()
            a.reset()
            await ended.wait()
            await until(lambda: not a.session.stream_count)
            assert inner.fileno() == -1


async def test_both_ways(sockets):
    async with half(sockets) as (a, outer, ended):
        await a.send(b"to the socket")
        assert await recv(outer) == b"to the socket"
        await sendall(outer, b"to the stream")
        assert await exactly(a, 13) == b"to the stream"
        assert not ended.is_set()


@pytest.mark.parametrize("size", [GATHERED - 1, GATHERED, PAYLOAD, 3 * PAYLOAD + GATHERED + 1, 2_000_000])
async def test_large_frames_arrive_whole_and_before_the_end(sockets, size):
    """Also if the end came in the same read, and the socket takes them piece by piece."""
    body = random.Random(size).randbytes(size)
    async with half(sockets) as (a, outer, ended), asyncio.TaskGroup() as group:
        receiving = group.create_task(recv_all(outer))
        await a.send(body)
        await a.send(b"the end")
        await a.send_eof()
        assert await receiving == body + b"the end"
        assert not ended.is_set()


@pytest.mark.parametrize(("size", "early"), [(10, False), (GATHERED, False), (10, True)])
async def test_the_last_data_and_the_end_are_one_segment(size, early):
    """Be it small, gathered, or there before the socket; what is not the last leaves at once."""
    pair = Pair(kk.Limits(initial_window=MIB, initial_streams=8))
    ours, theirs = pair.open(accept=False)
    theirs.sink = inbox = Inbox()
    inbox.mux = theirs
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outer = socket.create_connection(listener.getsockname())
        inner, _ = listener.accept()
    outer.settimeout(10)
    inner.setblocking(False)
    last = Data(ours.id, bytes(size), 1)
    ended = asyncio.Event()
    with outer:
        if early:
            pair.client.inject(last)
            sent = segments_sent(inner)
            join(theirs, inner, on_closed=ended.set)
        else:
            join(theirs, inner, on_closed=ended.set)
            sent = segments_sent(inner)
            pair.client.inject(Data(ours.id, b"not the last"))
            assert segments_sent(inner) == sent + 1
            assert outer.recv(99) == b"not the last"
            # Of what fills half the window the kernel holds nothing back: let it grow.
            for _ in range(4):
                pair.client.inject(Data(ours.id, bytes(PAYLOAD)))
                assert len(outer.recv(PAYLOAD, socket.MSG_WAITALL)) == PAYLOAD
            sent = segments_sent(inner)
            pair.client.inject(last)
        assert segments_sent(inner) == sent + 1
        received = 0
        while chunk := outer.recv(65_536):
            received += len(chunk)
        assert received == size
    async with asyncio.timeout(10):
        await ended.wait()


async def test_of_large_frames_only_what_the_socket_does_not_take_waits_for_credit():
    pair = Pair(kk.Limits(initial_window=MIB, initial_streams=8))
    ours, theirs = pair.open(accept=False)
    outer, inner = unix_socketpair()
    ended = asyncio.Event()
    join(theirs, inner, on_closed=ended.set)
    pair.pump()
    read = [Data(ours.id, bytes(PAYLOAD))] * 4
    window = theirs.receive_window
    pair.client.inject(*read)
    kept = theirs.sink.transport.get_write_buffer_size()
    assert 0 < kept == window.received - window.consumed
    pair.client.inject(*read)  # nothing more is taken now
    assert window.received - window.consumed == kept + 4 * PAYLOAD
    while window.received > window.consumed:
        assert await recv(outer)
    pair.client.inject(Data(ours.id, b"", 1))  # or the clean end of the socket would leave the stream half open
    outer.close()
    await ended.wait()


@pytest.mark.parametrize("size", [PAYLOAD, 3 * PAYLOAD])
async def test_what_came_before_the_streams_reset_is_no_more_than_what_was_sent(size):
    """Of a Unix socket, which knows no reset, the other end can read what was written before it."""
    body = random.Random(size).randbytes(size)
    async with half(unix_socketpair) as (a, outer, ended):
        await a.send(body)
        a.reset()
        assert body.startswith(await recv_all(outer))
        await ended.wait()


# Every order of ends


async def test_beside_an_interactive_stream_bulk_is_read_in_smaller_pieces():
    async with memory_stream_pair() as (a, b):
        outer, inner = tcp_socketpair()
        ended = asyncio.Event()
        stream = a.detach()
        flight = stream._mux.flight
        joint = Splice(on_closed=ended.set)
        joint.on_connected = lambda _transport: joint.attach(stream)
        transport = SocketTransport(inner, joint.local)

        def read_after(size, *, hurried):
            flight.tight = hurried
            joint.local_data(bytes(size))
            return transport.read_size

        assert read_after(100, hurried=True) == QUEUE_HIGH
        assert read_after(PAYLOAD, hurried=True) == PAYLOAD
        assert read_after(100, hurried=False) == PAYLOAD
        assert read_after(PAYLOAD, hurried=False) == QUEUE_HIGH
        outer.close()
        b.reset()
        transport.abort()
        await ended.wait()


@asynccontextmanager
async def chain(sockets):
    """Socket, splice, stream, splice, socket: the sockets at the ends."""
    async with memory_stream_pair() as (a, b):
        near, near_inner = sockets()
        far, far_inner = sockets()
        ended = [asyncio.Event(), asyncio.Event()]
        await splice(a, near_inner, on_closed=ended[0].set, code=kk.Code.CANCELLED)
        await splice(b, far_inner, on_closed=ended[1].set)
        try:
            yield near, far
        finally:
            near.close()
            far.close()
            for event in ended:
                await event.wait()
            await until(lambda: not a.session.stream_count and not b.session.stream_count)
            assert a.session.stats().granted == b.session.stats().granted == 0


STEPS = {
    "near eof": lambda near, _far: near.shutdown(socket.SHUT_WR),
    "far eof": lambda _near, far: far.shutdown(socket.SHUT_WR),
    "near close": lambda near, _far: near.close(),
    "far close": lambda _near, far: far.close(),
    "near reset": lambda near, _far: reset(near),
    "far reset": lambda _near, far: reset(far),
}


@pytest.mark.parametrize("pause", [0.0, 0.01])
async def test_every_order_of_ends(sockets, pause):
    for steps in itertools.chain(itertools.permutations(STEPS, 1), itertools.permutations(STEPS, 2)):
        async with chain(sockets) as (near, far):
            await sendall(near, b"request")
            assert await recv(far) == b"request"
            await sendall(far, b"x" * 1000)
            for step in steps:
                try:
                    STEPS[step](near, far)
                except OSError as error:
                    assert error.errno in (errno.EBADF, errno.ENOTCONN), steps
                await anyio.sleep(pause)


async def test_a_half_close_leaves_the_other_half_open(sockets):
    async with chain(sockets) as (near, far):
        await sendall(near, b"request")
        near.shutdown(socket.SHUT_WR)
        assert await recv_all(far) == b"request"
        await sendall(far, b"answer")
        assert await recv(near) == b"answer"
        far.shutdown(socket.SHUT_WR)
        assert await recv(near) == b""


async def test_a_reset_travels_on():
    async with chain(tcp_socketpair) as (near, far):
        await sendall(near, b"x")
        await recv(far)
        reset(near)
        with pytest.raises(ConnectionResetError):
            await recv(far)
    async with chain(tcp_socketpair) as (near, far):
        await sendall(far, b"x")
        await recv(near)
        reset(far)
        with pytest.raises(ConnectionResetError):
            await recv(near)


@pytest.mark.parametrize(("code", "error"), [(kk.Code.TARGET_RESET, kk.TargetResetError), (2**31, kk.ApplicationError)])
async def test_a_reset_reaches_the_stream_with_its_code(code, error):
    async with half(tcp_socketpair, code=code) as (a, outer, _ended):
        await sendall(outer, b"x")
        await exactly(a, 1)
        reset(outer)
        with pytest.raises(error):
            await a.receive()


async def test_a_streams_reset_reaches_the_socket():
    async with half(tcp_socketpair) as (a, outer, ended):
        await a.send(b"x")
        assert await recv(outer) == b"x"
        a.reset()
        with pytest.raises(ConnectionResetError):
            await recv(outer)
        await ended.wait()


async def test_the_end_of_the_session_reaches_the_socket():
    async with half(tcp_socketpair) as (a, outer, ended):
        await a.send(b"x")
        assert await recv(outer) == b"x"
        a.session.abort()
        with pytest.raises(ConnectionResetError):
            await recv(outer)
        await ended.wait()


async def test_what_was_answered_before_a_reset_arrives():
    # The target has answered and closed; a late byte of the request makes it reset. The answer is whole.
    answer = random.Random(8).randbytes(100_000)
    async with half(tcp_socketpair) as (a, outer, ended):
        await a.send(b"request")
        assert await recv(outer) == b"request"
        await sendall(outer, answer)  # more than the stream's window: a part waits in the splice
        outer.close()
        await anyio.sleep(0.05)
        await a.send(b"late")
        await ended.wait()
        with pytest.raises(kk.TargetResetError):
            for _ in range(1000):
                await a.send(b"later")
                await anyio.sleep(0.001)
        assert await until_end(a) == answer


async def test_an_early_answer_arrives_though_the_target_closes_over_the_upload():
    # It says why it wants no more, and closes over unread bytes: the next write finds the reset before reading does.
    answer = b"413 too large"
    for size in (1, 1000):
        async with chain(tcp_socketpair) as (near, far):
            await sendall(near, b"upload")
            assert await recv(far, size) == b"upload"[:size]
            far.send(answer)
            if size > 1:
                reset(far)
            else:
                far.close()
            with contextlib.suppress(ConnectionError):
                while True:
                    await sendall(near, bytes(1000))
                    await anyio.sleep(0)
            assert await recv(near) == answer


async def test_what_came_before_a_reset_goes_before_it():
    answer = random.Random(11).randbytes(200_000)  # more than the stream's window
    async with half(tcp_socketpair) as (a, outer, ended):
        await sendall(outer, answer)
        await anyio.sleep(0.05)
        reset(outer)
        await ended.wait()
        assert await exactly(a, 64 * 1024) == answer[: 64 * 1024]
        with pytest.raises(kk.TargetResetError):
            while True:
                await a.receive()
        with pytest.raises(kk.TargetResetError):
            await a.send(b"no more")


@pytest.mark.parametrize("finished", [False, True])
async def test_what_came_before_a_reset_is_given_up_if_the_peer_never_reads_it(finished, monkeypatch):
    monkeypatch.setattr(import_module("konnektor.splice"), "STALLED", 0.05)  # not the function
    async with half(tcp_socketpair) as (a, outer, ended):
        await sendall(outer, bytes(200_000))  # more than the stream's window
        if finished:
            outer.shutdown(socket.SHUT_WR)
            await anyio.sleep(0.05)
        reset(outer)
        await ended.wait()
        await until(lambda: not a.session.stream_count)


async def test_a_reset_right_behind_data():
    # One event for both: uvloop tells of a broken socket once.
    async with half(tcp_socketpair) as (a, outer, ended):
        await a.send(b"x")
        assert await recv(outer) == b"x"
        await sendall(outer, b"data")
        reset(outer)
        await ended.wait()
        with pytest.raises(kk.TargetResetError):
            while True:
                await a.receive()


async def test_an_answer_arrives_though_the_request_is_not_read_to_its_end():
    # The peer closes with FIN and STOP; the socket goes on being read, so that closing it resets nothing.
    answer = random.Random(9).randbytes(500_000)
    async with half(tcp_socketpair) as (a, outer, ended):

        async def upload():
            try:
                while True:
                    await sendall(outer, bytes(100_000))
            except OSError:
                pass

        async def serve():
            await exactly(a, 1000)
            await a.send(answer)
            await a.aclose()

        task = asyncio.create_task(upload())
        serving = asyncio.create_task(serve())
        received = bytearray()
        while len(received) < len(answer):
            received += await recv(outer)
        assert received == answer
        await serving
        await ended.wait()
        await task


async def test_what_came_before_the_splice_comes_first(sockets):
    for send_end in (False, True):
        async with memory_stream_pair() as (a, b):
            await a.send(b"early ")
            await a.send(b"data" * 500)
            if send_end:
                await a.aclose()
            await anyio.sleep(0.02)
            outer, inner = sockets()
            ended = asyncio.Event()
            await splice(b, inner, on_closed=ended.set)
            if not send_end:
                await a.send_eof()
            assert await recv_all(outer) == b"early " + b"data" * 500
            outer.close()
            await ended.wait()


async def test_splicing_a_stream_that_broke_before():
    async with memory_stream_pair() as (a, b):
        a.reset()
        await anyio.sleep(0.02)
        outer, inner = tcp_socketpair()
        ended = asyncio.Event()
        await splice(b, inner, on_closed=ended.set)
        await ended.wait()
        with pytest.raises(ConnectionResetError):
            await recv(outer)
        outer.close()


async def test_splicing_what_cannot_be_spliced():
    async with memory_stream_pair() as (a, b):
        outer, inner = tcp_socketpair()
        task = asyncio.create_task(b.receive())
        await asyncio.sleep(0)
        with pytest.raises(anyio.BusyResourceError):
            await splice(b, inner)
        assert inner.fileno() == -1
        assert await recv(outer) == b""
        await a.send(b"x")
        assert await task == b"x"
        b.close()
        again, inner = tcp_socketpair()
        with pytest.raises(StreamClosedError):
            await splice(b, inner)
        inner.close()
        with pytest.raises(OSError, match="Bad file"):
            await splice(a, inner)
        outer.close()
        again.close()


async def test_a_handler_splices_and_returns():
    pairs = []

    async def handler(stream, request):
        outer, inner = tcp_socketpair()
        pairs.append(outer)
        await splice(stream, inner)

    async def too_late(stream, request):
        outer, inner = tcp_socketpair()
        pairs.append(outer)
        with pytest.raises(asyncio.CancelledError):
            await anyio.sleep_forever()
        await splice(stream, inner)  # and the socket is broken off

    limits = kk.Limits(initial_streams=8)
    async with memory_session_pair(server_limits=limits) as (client, server):
        server.handlers.add(Tcp, handler)
        for _ in range(20):
            async with await client.open_tcp("x", 1) as stream:
                await stream.send(b"hello")
                outer = pairs.pop()
                assert await recv(outer) == b"hello"
                outer.close()
        await until(lambda: server._mux.admission.retired == 20)
        server.handlers.remove(Tcp)
        server.handlers.add(Tcp, too_late)
        stream = await client.open_tcp("x", 1, early=True)
        await until(lambda: pairs)
        stream.reset()
        await until(lambda: server._mux.admission.retired == 21)
        with pytest.raises(ConnectionResetError):
            await recv(pairs[0])
        pairs[0].close()


async def test_opening_from_a_socket_needs_no_task():
    async def handler(stream, request):
        await stream.accept()
        async for chunk in stream:
            await stream.send(chunk.upper())

    async with memory_session_pair() as (client, server):
        server.handlers.add(Tcp, handler)
        outer, inner = tcp_socketpair()
        ended = asyncio.Event()
        joint = Splice(on_closed=ended.set)
        joint.on_connected = lambda _transport: joint.attach(client.open_sink(Tcp("x", 1), joint))
        SocketTransport(inner, joint.local)
        await sendall(outer, b"before the answer")
        assert await recv(outer) == b"BEFORE THE ANSWER"
        outer.close()
        await ended.wait()
        await until(lambda: not client.stream_count)
        # Closed before the OPEN is even sent.
        outer, inner = tcp_socketpair()
        joint = Splice()
        joint.on_connected = lambda _transport: joint.attach(client.open_sink(Tcp("x", 1), joint))
        transport = SocketTransport(inner, joint.local)
        transport.abort()
        outer.close()
        await until(lambda: joint.transport is None)
        # Refused: the client gets a reset.
        server.handlers.remove(Tcp)
        outer, inner = tcp_socketpair()
        joint = Splice()
        joint.on_connected = lambda _transport: joint.attach(client.open_sink(Tcp("x", 1), joint))
        SocketTransport(inner, joint.local)
        with pytest.raises(ConnectionResetError):
            await recv(outer)
        outer.close()
        # No session to open on: broken off before there is a stream.
        outer, inner = tcp_socketpair()
        joint = Splice()
        joint.on_connected = lambda _transport: joint.break_off()
        SocketTransport(inner, joint.local)
        joint.local.data_received(b"x")
        assert not joint.local.eof_received()
        with pytest.raises(ConnectionResetError):
            await recv(outer)
        outer.close()


# Backpressure


async def test_a_target_that_never_reads_leaves_memory_flat(sockets):
    async with half(sockets) as (a, outer, _ended):
        sent = 0
        with anyio.move_on_after(0.3):
            while True:
                await a.send(bytes(64 * 1024))
                sent += 64 * 1024
        limits = a.session.limits
        assert sent <= limits.initial_window + limits.send_queue + 16 * 1024 * 1024  # what sockets hold
        received = 0
        while received < sent:
            received += len(await recv(outer))


async def test_a_stream_that_is_not_read_stops_the_socket(sockets):
    async with half(sockets) as (a, outer, _ended):
        sent = 0
        with anyio.move_on_after(0.3):
            while True:
                await sendall(outer, bytes(64 * 1024))
                sent += 64 * 1024
        assert sent <= a.session.limits.initial_window + QUEUE_HIGH + 16 * 1024 * 1024
        assert len(await exactly(a, sent)) == sent


async def test_a_slow_splice_holds_up_nobody():
    async with memory_stream_pair() as (stalled, spliced_end), memory_stream_pair() as (a, b):
        outer, inner = tcp_socketpair()
        ended = asyncio.Event()
        await splice(spliced_end, inner, on_closed=ended.set)
        with anyio.move_on_after(0.1):
            while True:
                await stalled.send(bytes(64 * 1024))
        await a.send(b"x")
        assert await exactly(b, 1) == b"x"
        stalled.reset()
        await ended.wait()
        outer.close()


async def test_an_idle_splice_holds_no_buffer(sockets):
    async with half(sockets) as (a, outer, _ended):
        await a.send(bytes(200_000))
        assert sum([len(await recv(outer)) for _ in range(1)])
        await sendall(outer, b"x")
        await a.receive()
        received = 0
        await a.send(b"end")
        while not (chunk := await recv(outer)).endswith(b"end"):
            received += len(chunk)
        await anyio.sleep(0.01)
        joint = next(o for o in gc.get_objects() if type(o) is Splice and o.transport is not None)
        assert joint.transport._buffer is None
        assert not joint._held


async def test_a_thousand_at_once():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4000:
        pytest.skip("needs 4,000 file descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    outers = []

    async def handler(stream, request):
        outer, inner = unix_socketpair()
        outers.append(outer)
        await splice(stream, inner)

    try:
        async with memory_session_pair() as (client, server):
            server.handlers.add(Tcp, handler)
            streams = await asyncio.gather(*(client.open_tcp("x", 1) for _ in range(1000)))
            for number, stream in enumerate(streams):
                await stream.send(b"%d" % number)
            got = {await recv(outer) for outer in outers}
            assert got == {b"%d" % number for number in range(1000)}
            for outer in outers:
                await sendall(outer, b"back")
                outer.close()
            for stream in streams:
                assert await until_end(stream) == b"back"
                await stream.aclose()
            await until(lambda: not client.stream_count and not server.stream_count)
            assert server.stats().granted == client.stats().granted == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# TLS at the local side


@asynccontextmanager
async def tls_spliced(authority, client, **kwargs):
    """A stream, spliced to a TLS server's side of a connection; the task of ``client(sock)``, which has the other side."""
    async with memory_stream_pair() as (a, b):
        outer, inner = tcp_socketpair()
        ended = asyncio.Event()
        joint = Splice(on_closed=ended.set)
        joint.on_connected = lambda _transport: joint.attach(b.detach())
        task = asyncio.create_task(client(outer))
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: joint.local, inner, ssl=authority.server, **kwargs)
        yield a, task, ended
        a.reset()
        await ended.wait()
        await task
        await until(lambda: not a.session.stream_count)


@asynccontextmanager
async def tls_half(authority, **kwargs):
    """The same, and what the loop makes of the client's side."""

    def client(sock):
        return asyncio.open_connection(sock=sock, ssl=authority.client, server_hostname="cp")

    async with tls_spliced(authority, client, **kwargs) as (a, connecting, ended):
        reader, writer = await connecting
        yield a, reader, writer, ended
        writer.close()
        with contextlib.suppress(OSError):  # SSLError is one
            await writer.wait_closed()


def blocking(authority, function, *args):
    """A client in a thread, on OpenSSL's own system calls: the loops' own keep to themselves what these tests look for."""

    def run(sock):
        sock.setblocking(True)
        with sock, authority.client.wrap_socket(sock, server_hostname="cp", suppress_ragged_eofs=False) as tls:
            return function(tls, *args)

    return lambda sock: asyncio.to_thread(run, sock)


async def test_tls_ends_both_halves_cleanly(authority, caplog):
    data = random.Random(10).randbytes(300_000)
    async with tls_half(authority) as (a, reader, writer, ended):
        await a.send(data)
        assert await reader.readexactly(len(data)) == data
        writer.write(data)
        assert await exactly(a, len(data)) == data
        # The stream ends: its FIN must close the TLS connection, not break the session.
        await a.send(b"last")
        await a.send_eof()
        assert await reader.read() == b"last"
        await ended.wait()
        assert await until_end(a) == b""
    async with tls_half(authority) as (a, reader, writer, ended):
        writer.write(b"last")
        writer.close()
        assert await until_end(a) == b"last"
        with pytest.raises(kk.PeerError):
            for _ in range(1000):
                await a.send(b"x")
                await anyio.sleep(0.001)
        await ended.wait()
    assert "eof_received" not in caplog.text


def upload(tls, data, goodbye, sent):
    """A client that does not wait for the other end's close_notify before its FIN."""
    tls.sendall(data)
    if goodbye:
        tls.settimeout(0.1)
        with contextlib.suppress(OSError):  # it is sent, and not answered yet
            tls.unwrap()
        tls.settimeout(None)
    tls.shutdown(socket.SHUT_WR)
    sent.set()
    with contextlib.suppress(OSError):
        while tls.recv(65_536):
            pass


@pytest.mark.parametrize("size", [1000, 500_000, 800_000])  # the end comes while the splice reads, and while it pauses
@pytest.mark.parametrize("goodbye", [True, False])
async def test_an_upload_that_tls_does_not_vouch_for_is_no_clean_end(authority, caplog, size, goodbye):
    caplog.set_level(logging.DEBUG, "konnektor.splice")
    data = random.Random(13).randbytes(size)
    sent = threading.Event()
    async with tls_spliced(authority, blocking(authority, upload, data, goodbye, sent)) as (a, _, _):
        await until(sent.is_set)
        await anyio.sleep(0.05)  # the loop has seen the FIN, unless it has paused its socket, too
        received = b""
        with pytest.raises(anyio.EndOfStream if goodbye else kk.TargetResetError):
            while True:
                received += await a.receive()
        assert received == data if goodbye else data.startswith(received)
    assert ("without close_notify" in caplog.text) is not goodbye


async def test_a_tls_client_that_has_the_whole_answer_may_leave_without_close_notify(authority, caplog):
    caplog.set_level(logging.DEBUG, "konnektor.splice")
    async with tls_spliced(authority, blocking(authority, read_after_a_pause)) as (a, reading, ended):
        await a.send(b"answer")
        await a.send_eof()
        assert await reading == b"answer"
        assert await until_end(a) == b""
        await ended.wait()
    assert "close_notify" not in caplog.text


def read_after_a_pause(tls):
    """uvloop's own client, paused, loses what its kernel holds when the connection ends."""
    time.sleep(0.5)
    data = b""
    while chunk := tls.recv(65_536):
        data += chunk
    return data


@pytest.mark.parametrize(
    "size", [100_000, 400_000, 800_000, 1_500_000]
)  # around what the kernel takes, and TLS besides
async def test_a_tls_client_that_pauses_gets_the_tail(authority, size):
    data = random.Random(12).randbytes(size)
    client = blocking(authority, read_after_a_pause)
    async with tls_spliced(authority, client, ssl_shutdown_timeout=0.1) as (a, reading, _):
        await a.send(data)
        await a.send_eof()
        assert await reading == data


@pytest.mark.replaces_methods  # a constant, for compiled ones that is the same
async def test_a_tls_client_that_never_takes_the_tail_is_reset(authority, monkeypatch):
    monkeypatch.setattr(loop_transport, "GIVE_UP", 0.1)
    data = bytes(800_000)
    async with tls_half(authority) as (a, reader, writer, ended):
        writer.transport.pause_reading()
        await a.send(data)
        await a.send_eof()
        await ended.wait()
        with pytest.raises(ConnectionResetError):
            writer.transport.resume_reading()
            await reader.read()


async def test_the_reset_of_a_tls_client_is_noticed_though_nobody_takes_what_it_sent(authority, monkeypatch):
    monkeypatch.setattr(loop_transport, "LOOK_AFTER", 0.05)
    async with tls_half(authority) as (a, _reader, writer, ended):
        writer.write(bytes(2_000_000))
        await until(lambda: writer.transport.get_write_buffer_size() < 2_000_000)
        await anyio.sleep(0.2)  # it waits, and is there
        assert not ended.is_set()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        writer.transport.abort()
        await ended.wait()
        with pytest.raises(kk.PeerError):
            await exactly(a, 2_000_000)


async def test_tls_breaks_off(authority):
    async with tls_half(authority) as (a, reader, writer, ended):
        await a.send(b"x")
        await reader.readexactly(1)
        a.reset()
        await ended.wait()
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    async with tls_half(authority) as (a, reader, writer, ended):
        await a.send(b"x")
        await reader.readexactly(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        writer.transport.abort()
        await ended.wait()
        with pytest.raises((kk.TargetResetError, anyio.EndOfStream)):
            await a.receive()
