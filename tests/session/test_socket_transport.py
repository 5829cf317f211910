"""The splice's own transport keeps asyncio's contract, and copies only what the kernel does not take."""

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct

import pytest

from konnektor import socket_transport
from konnektor.poller import READ
from konnektor.socket_transport import SocketTransport
from tests.session.pairs import descriptors, segments_sent


class Recorder(asyncio.BufferedProtocol):
    def __init__(self, size=65_536, *, keep_open=True):
        self.buffer = bytearray(size)
        self.events = []
        self.received = b""
        self.keep_open = keep_open
        self.changed = asyncio.Event()

    def note(self, *event):
        self.events.append(event)
        self.changed.set()

    def connection_made(self, transport):
        self.transport = transport
        self.note("made")

    def get_buffer(self, sizehint):
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes):
        self.received += bytes(self.buffer[:nbytes])
        self.note("data", nbytes)

    def eof_received(self):
        self.note("eof")
        return self.keep_open

    def pause_writing(self):
        self.note("pause")

    def resume_writing(self):
        self.note("resume")

    def connection_lost(self, exc):
        self.note("lost", exc)

    async def until(self, name):
        async with asyncio.timeout(30):
            while name not in [event[0] for event in self.events]:
                self.changed.clear()
                await self.changed.wait()
        return next(event for event in self.events if event[0] == name)

    async def receive(self, data):
        """Waits until these bytes have been received, and no others."""
        async with asyncio.timeout(30):
            while self.received != data:
                assert data.startswith(self.received)
                self.changed.clear()
                await self.changed.wait()


class Hesitant(Recorder):
    """Pauses after each read."""

    def buffer_updated(self, nbytes):
        super().buffer_updated(nbytes)
        self.transport.pause_reading()


@contextlib.contextmanager
def joined(*, tcp=False, **kwargs):
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as server:
            far = socket.create_connection(server.getsockname())
            near, _ = server.accept()
    else:
        near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    recorder = Recorder(**kwargs)
    transport = SocketTransport(near, recorder)
    with far:
        yield transport, recorder, far
    transport.abort()


async def read_all(sock):
    loop = asyncio.get_running_loop()
    data = b""
    while chunk := await loop.sock_recv(sock, 65_536):
        data += chunk
    return data


async def test_reads_and_half_close():
    with joined() as (transport, recorder, far):
        far.send(b"hello")
        far.shutdown(socket.SHUT_WR)
        await recorder.until("eof")
        assert recorder.received == b"hello"
        transport.write(b"answer")
        transport.write_eof()
        transport.write(b"ignored")
        assert await read_all(far) == b"answer"
        transport.close()
        assert await recorder.until("lost") == ("lost", None)
        assert transport.is_closing()


async def test_eof_closes_unless_the_protocol_keeps_it_open():
    with joined(keep_open=False) as (_transport, recorder, far):
        far.shutdown(socket.SHUT_WR)
        assert await recorder.until("lost") == ("lost", None)


async def test_what_the_kernel_does_not_take_is_kept_and_sent_before_the_end():
    with joined() as (transport, recorder, far):
        data = bytearray(b"x" * 4_000_000)
        transport.write(memoryview(data))
        data[:] = bytes(len(data))  # whoever wrote may reuse the buffer at once
        assert ("pause",) in recorder.events
        assert 0 < transport.get_write_buffer_size() < len(data)
        transport.write(b"y")
        transport.write_eof()
        assert await read_all(far) == b"x" * len(data) + b"y"
        await recorder.until("resume")
        assert transport.get_write_buffer_size() == 0


@pytest.mark.parametrize("size", [1, 10_000, 1_000_000])
async def test_several_are_written_as_one(size):
    with joined() as (transport, recorder, far):
        chunks = [bytearray(bytes([number]) * size) for number in range(5)]
        whole = b"".join(chunks)
        kept = transport.writelines([memoryview(chunk) for chunk in chunks])
        assert kept == transport.get_write_buffer_size() < len(whole)
        for chunk in chunks:
            chunk[:] = bytes(size)  # whoever wrote may reuse the buffers at once
        assert (("pause",) in recorder.events) == (size == 1_000_000)
        assert transport.writelines([b"and ", memoryview(b"more")]) == (8 if kept else 0)
        transport.write_eof()
        assert transport.writelines([b"ignored"]) == 0
        assert await read_all(far) == whole + b"and more"
        transport.close()
        transport.writelines([b"ignored"])
        await recorder.until("lost")


@pytest.mark.parametrize("several", [False, True])
async def test_an_end_goes_with_what_was_written_last(several):
    with joined(tcp=True) as (transport, _, far):
        near = transport.get_extra_info("socket")
        before = segments_sent(near)
        if several:
            assert transport.writelines([b"the ", b"last"], more=True) == 0
        else:
            transport.write(b"the last", more=True)
        assert segments_sent(near) == before
        transport.write_eof()
        assert segments_sent(near) == before + 1
        assert await read_all(far) == b"the last"


@pytest.mark.parametrize("tcp", [False, True])
async def test_what_waits_for_more_goes_with_it(tcp):
    with joined(tcp=tcp) as (transport, _, far):
        transport.write(b"some, ", more=True)
        transport.write(b"more, ")
        transport.write(b"x" * 4_000_000, more=True)
        transport.write(b"the last", more=True)
        transport.write_eof()
        assert await read_all(far) == b"some, more, " + b"x" * 4_000_000 + b"the last"


@pytest.mark.parametrize("taken", [BlockingIOError, InterruptedError, 1, 6])
async def test_several_of_which_the_kernel_takes_little(taken):
    class Full(socket.socket):
        def sendmsg(self, chunks):
            if isinstance(taken, type):
                raise taken
            return super().send(b"".join(chunks)[:taken])

    near, far = socket.socketpair()
    with far:
        far.setblocking(False)
        full = Full(fileno=near.detach())
        full.setblocking(False)
        recorder = Recorder()
        transport = SocketTransport(full, recorder)
        kept = transport.writelines([b"some", b"", b"more"])
        assert kept == transport.get_write_buffer_size() == (8 - taken if isinstance(taken, int) else 8)
        transport.write_eof()
        assert await read_all(far) == b"somemore"
        await recorder.until("resume")
        transport.close()
        await recorder.until("lost")


async def test_several_for_an_end_that_takes_no_more():
    with joined() as (transport, recorder, far):
        transport.pause_reading()
        far.send(b"the answer")
        far.close()
        transport.writelines([b"a", b"b"])
        transport.writelines([b"c", b"d"])
        assert not recorder.received
        transport.resume_reading()
        await recorder.until("lost")
        assert recorder.received == b"the answer"


async def test_close_flushes():
    with joined() as (transport, recorder, far):
        transport.write(b"x" * 4_000_000)
        transport.close()
        transport.close()
        transport.write(b"ignored")
        assert len(await read_all(far)) == 4_000_000
        assert await recorder.until("lost") == ("lost", None)


async def test_abort_drops():
    with joined() as (transport, recorder, _far):
        transport.write(b"x" * 4_000_000)
        transport.abort()
        transport.abort()
        assert await recorder.until("lost") == ("lost", None)
        assert [event for event in recorder.events if event[0] == "lost"] == [("lost", None)]


async def test_pause_and_resume_reading():
    with joined() as (transport, recorder, far):
        transport.pause_reading()
        transport.pause_reading()
        assert not transport.is_reading()
        far.send(b"later")
        for _ in range(5):
            await asyncio.sleep(0)
        assert recorder.received == b""
        transport.resume_reading()
        transport.resume_reading()
        await recorder.until("data")
        assert recorder.received == b"later"
        transport.close()
        transport.resume_reading()
        assert not transport.is_reading()


async def test_a_buffer_that_is_filled_is_read_again():
    with joined(size=10) as (_transport, recorder, far):
        far.send(b"0123456789abc")
        async with asyncio.timeout(10):
            while len(recorder.received) < 13:
                recorder.changed.clear()
                await recorder.changed.wait()
        assert [event[1] for event in recorder.events if event[0] == "data"] == [10, 3]


async def test_a_protocol_without_a_buffer_of_its_own_gets_bytes():
    class Plain(asyncio.Protocol):
        def __init__(self):
            self.received = []

        def data_received(self, data):
            self.received.append(data)

        def eof_received(self):
            ended.set_result(None)

    ended = asyncio.get_running_loop().create_future()
    with joined() as (transport, _recorder, far):
        plain = Plain()
        transport.set_protocol(plain)
        sent = bytes(range(256)) * 400
        await asyncio.get_running_loop().sock_sendall(far, sent)
        far.shutdown(socket.SHUT_WR)
        await ended
        assert b"".join(plain.received) == sent
        assert all(type(data) is bytes for data in plain.received)
        assert transport.is_closing()


async def test_reading_that_is_paused_and_resumed_in_one_turn_goes_on():
    with joined() as (transport, recorder, far):
        await asyncio.sleep(0)
        transport.pause_reading()
        transport.resume_reading()
        far.send(b"1")
        await recorder.until("data")
        transport.pause_reading()
        far.send(b"2")
        await asyncio.sleep(0.01)
        assert recorder.received == b"1"
        transport.resume_reading()
        transport.pause_reading()
        await asyncio.sleep(0.01)
        assert recorder.received == b"1"
        transport.resume_reading()
        async with asyncio.timeout(10):
            while recorder.received != b"12":
                recorder.changed.clear()
                await recorder.changed.wait()


@pytest.mark.parametrize("during", ["reading", "reading data", "writing", "flushing"])
async def test_a_reset_is_reported_once(during):
    with joined(tcp=True) as (transport, recorder, far):
        if during == "reading data":
            far.send(b"the last")
        if during == "flushing":
            transport.write(b"x" * 30_000_000)
            assert transport.get_write_buffer_size()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if during in ("writing", "flushing"):
            transport.pause_reading()
        far.close()
        if during == "writing":
            async with asyncio.timeout(10):
                while not transport.is_closing():
                    transport.write(b"x")
                    await asyncio.sleep(0)
        _, error = await recorder.until("lost")
        assert isinstance(error, ConnectionError)
        await asyncio.sleep(0)
        assert len([event for event in recorder.events if event[0] == "lost"]) == 1


def reset(far):
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()


class Counting:
    """An epoll, how often it had something to tell, and how often it was told anything after a socket's first time."""

    made = select.epoll

    def __init__(self):
        self.inner = self.made()
        self.told = self.changed = 0

    def modify(self, fd, events):
        self.changed += 1
        self.inner.modify(fd, events)

    def unregister(self, fd):
        self.changed += 1
        self.inner.unregister(fd)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def poll(self, *args):
        events = self.inner.poll(*args)
        self.told += len(events)
        return events


@pytest.fixture
def epolls(monkeypatch):
    """Those that are made during a test."""
    made = []
    monkeypatch.setattr(select, "epoll", lambda: made.append(Counting()) or made[-1])
    return made


async def told(epolls, *, within=0.05):
    """How often there was something to tell while nothing happened."""
    before = sum(epoll.told for epoll in epolls)
    await asyncio.sleep(within)
    return sum(epoll.told for epoll in epolls) - before


@pytest.mark.parametrize("keep_open", [False, True])
async def test_an_end_that_nothing_follows_is_not_told_for_ever(keep_open, epolls):
    """Nor need the kernel be told that nobody wants to hear more, or that the socket is closed."""
    with joined(keep_open=keep_open) as (transport, recorder, far):
        far.shutdown(socket.SHUT_WR)
        await recorder.until("eof" if keep_open else "lost")
        assert await told(epolls) == 0
        assert sum(epoll.changed for epoll in epolls) == 0
        transport.abort()


async def test_what_came_before_a_reset_is_read_though_reading_was_paused(epolls):
    with joined(tcp=True) as (transport, recorder, far):
        transport.pause_reading()
        far.send(b"the last")
        reset(far)
        assert await told(epolls) < 10
        assert not transport.is_closing() and not recorder.received
        transport.resume_reading()
        _, error = await recorder.until("lost")
        assert recorder.received == b"the last"
        assert isinstance(error, ConnectionError)


@pytest.mark.parametrize("by", ["the poller", "writing"])
async def test_a_pause_that_never_ends_does_not_hide_a_reset_for_ever(by, monkeypatch):
    """The client of a target that hangs: it is not read, and gives up."""
    monkeypatch.setattr(socket_transport, "PATIENCE", 0.05)
    with joined(tcp=True) as (transport, recorder, far):
        transport.pause_reading()
        far.send(b"more than anybody reads")
        reset(far)
        if by == "writing":
            transport.write(b"x")
        _, error = await recorder.until("lost")
        assert isinstance(error, ConnectionResetError)
        assert not recorder.received


async def test_each_pause_behind_a_reset_has_its_own_time(monkeypatch):
    monkeypatch.setattr(socket_transport, "PATIENCE", 1.0)

    with joined(tcp=True) as (transport, _, far):
        transport.set_protocol(recorder := Hesitant(1))
        recorder.connection_made(transport)
        transport.pause_reading()
        far.send(b"ab")
        reset(far)
        for received in (b"", b"a"):
            await asyncio.sleep(0.6)
            assert recorder.received == received and not transport.is_closing()
            transport.resume_reading()
        _, error = await recorder.until("lost")
        assert recorder.received == b"ab"
        assert isinstance(error, ConnectionResetError)


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("ends", ["one", "both"])
async def test_a_pause_over_what_is_whole_may_take_as_long_as_it_likes(tcp, ends, monkeypatch):
    monkeypatch.setattr(socket_transport, "PATIENCE", 0.01)
    with joined(tcp=tcp) as (transport, recorder, far):
        transport.pause_reading()
        far.send(b"the whole answer")
        if ends == "one":
            far.shutdown(socket.SHUT_WR)
        else:
            transport.write_eof()
            far.close()
        await asyncio.sleep(0.1)
        assert not transport.is_closing()
        transport.resume_reading()
        await recorder.until("eof")
        assert recorder.received == b"the whole answer"


async def test_a_reset_with_nothing_left_to_read_is_noticed_while_reading_is_paused():
    with joined(tcp=True) as (transport, recorder, far):
        transport.pause_reading()
        reset(far)
        _, error = await recorder.until("lost")
        assert isinstance(error, ConnectionError)


async def test_a_reset_after_the_end_is_noticed():
    with joined(tcp=True) as (_, recorder, far):
        far.shutdown(socket.SHUT_WR)
        await recorder.until("eof")
        reset(far)
        _, error = await recorder.until("lost")
        assert isinstance(error, ConnectionError)


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("paused", [False, True])
async def test_closed_by_both_ends_is_not_told_for_ever(tcp, paused, epolls):
    with joined(tcp=tcp) as (transport, recorder, far):
        if paused:
            transport.pause_reading()
        far.send(b"the last")
        transport.write_eof()
        far.close()
        assert await told(epolls) < 10
        assert not transport.is_closing()
        transport.resume_reading()
        await recorder.until("eof")
        assert recorder.received == b"the last"
        assert await told(epolls) < 10


async def test_paused_over_data_is_not_told_for_ever(epolls):
    with joined() as (transport, _, far):
        transport.pause_reading()
        far.send(b"waits")
        assert await told(epolls) < 10


@pytest.mark.parametrize("paused", [False, True])
async def test_what_came_before_a_reset_is_read_though_something_was_still_to_be_written(paused):
    """A server that refuses an upload: it answers, and closes over what it has not read."""
    with joined(tcp=True) as (transport, recorder, far):
        transport.write(b"x" * 30_000_000)
        await recorder.until("pause")
        if paused:
            transport.pause_reading()
        far.send(b"413 too large")
        reset(far)
        await asyncio.sleep(0.05)
        assert transport.is_closing() != paused
        transport.resume_reading()
        _, error = await recorder.until("lost")
        assert recorder.received == b"413 too large"
        assert isinstance(error, ConnectionError)


@pytest.mark.parametrize("paused", [False, True])
async def test_what_came_before_a_reset_is_read_though_writing_meets_it_first(paused, epolls):
    with joined(tcp=True) as (transport, recorder, far):
        far.send(b"413 too large")
        reset(far)
        if paused:
            transport.pause_reading()
        transport.write(b"the upload")
        transport.write(b"goes on")
        await asyncio.sleep(0.05)
        if paused:
            assert not recorder.received
            assert await told(epolls) < 10
            transport.write(b"and on")
            assert not transport.is_closing()
            transport.resume_reading()
        _, error = await recorder.until("lost")
        assert recorder.received == b"413 too large"
        assert isinstance(error, ConnectionResetError)
        assert "eof" not in [event[0] for event in recorder.events]


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("paused", [False, True])
async def test_an_end_is_told_as_one_though_writing_found_the_connection_broken(tcp, paused, epolls):
    with joined(tcp=tcp) as (transport, recorder, far):
        if paused:
            transport.pause_reading()
        far.send(b"the whole answer")
        far.close()
        for _ in range(3):  # the first is answered by the reset
            transport.write(b"late")
        if paused:
            await asyncio.sleep(0.05)
            assert not recorder.received
            assert await told(epolls) < 10
            transport.resume_reading()
        _, error = await recorder.until("lost")
        assert recorder.received == b"the whole answer"
        assert isinstance(error, ConnectionError)
        assert [event[0] for event in recorder.events].count("eof") == 1


async def test_an_end_behind_which_the_connection_broke_is_told_though_reading_is_paused():
    with joined(tcp=True) as (transport, recorder, far):
        transport.pause_reading()
        far.close()
        for _ in range(3):
            transport.write(b"late")
        await recorder.until("eof")
        _, error = await recorder.until("lost")
        assert isinstance(error, BrokenPipeError)


@pytest.mark.parametrize("reads", ["later", "now"])
async def test_what_waits_for_an_end_that_takes_no_more_is_dropped(reads):
    """Or whoever brought it would wait for as long as reading is paused."""
    with joined(tcp=reads == "now") as (transport, recorder, far):
        if reads == "later":
            transport.pause_reading()
        transport.write(b"x" * 30_000_000)
        await recorder.until("pause")
        far.send(b"the answer")
        (reset if reads == "now" else socket.socket.close)(far)
        await recorder.until("resume" if reads == "later" else "lost")
        assert transport.get_write_buffer_size() == 0
        assert recorder.received == (b"" if reads == "later" else b"the answer")
        transport.resume_reading()
        await recorder.until("lost")
        assert recorder.received == b"the answer"


async def test_an_end_that_only_takes_no_more_is_read_on(epolls):
    with joined() as (transport, recorder, far):
        far.shutdown(socket.SHUT_RD)
        transport.write(b"too late")
        assert await told(epolls) < 10
        far.send(b"still there")
        await recorder.until("data")
        assert recorder.received == b"still there"
        assert not transport.is_closing()


async def test_closed_by_the_other_end_with_something_still_to_be_written():
    with joined() as (transport, recorder, far):
        transport.write(b"x" * 30_000_000)
        await recorder.until("pause")
        far.close()
        _, error = await recorder.until("lost")
        assert isinstance(error, ConnectionError)


async def test_one_that_cannot_be_watched_again_breaks_and_nothing_else(epolls):
    with joined(tcp=True) as (transport, recorder, far):
        transport.pause_reading()
        far.send(b"told of, and not read")
        await asyncio.sleep(0.05)

        def none_left(*_):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        epolls[0].modify = none_left
        transport.resume_reading()
        _, error = await recorder.until("lost")
        assert error.errno == errno.ENOMEM


async def test_what_did_not_fit_into_one_read_is_read_by_the_next_ones():
    """The poller tells of it once."""
    with joined(tcp=True) as (transport, recorder, far):
        transport.set_protocol(recorder := Recorder(3))
        recorder.connection_made(transport)
        far.send(b"one two three")
        await recorder.receive(b"one two three")
        far.send(b" four")
        far.shutdown(socket.SHUT_WR)
        await recorder.until("eof")
        assert recorder.received == b"one two three four"


async def test_an_end_that_came_with_the_last_data_waits_for_a_pause_to_end():
    with joined(tcp=True) as (transport, _, far):
        transport.set_protocol(recorder := Hesitant())
        recorder.connection_made(transport)
        far.send(b"the last")
        far.shutdown(socket.SHUT_WR)
        await recorder.receive(b"the last")
        await asyncio.sleep(0.05)
        assert not transport.is_reading() and recorder.events[-1] == ("data", 8)
        transport.resume_reading()
        await recorder.until("eof")


async def test_urgent_data_hides_nothing_behind_it():
    """A read ends before it, with less than there is room for (tcp(7))."""
    with joined(tcp=True) as (_, recorder, far):
        far.send(b"before ")
        far.send(b"!", socket.MSG_OOB)
        far.send(b"behind")
        await recorder.receive(b"before behind")


async def test_descriptors_that_are_passed_along_hide_nothing_behind_them():
    """A read ends with the message that they came with (unix(7)). They are closed: nobody asked for them."""
    before = descriptors()
    with joined() as (transport, recorder, far):
        transport.pause_reading()
        for part in (b"one", b" two", b" three"):
            socket.send_fds(far, [part], [far.fileno()])
        await asyncio.sleep(0)
        transport.resume_reading()
        await recorder.receive(b"one two three")
    await recorder.until("lost")
    assert descriptors() == before


async def test_a_protocol_that_fails_misses_nothing_of_what_comes_later():
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))

    class Failing(Recorder):
        def buffer_updated(self, nbytes):
            super().buffer_updated(nbytes)
            raise ValueError(nbytes)

    with joined(tcp=True) as (transport, _, far):
        transport.set_protocol(recorder := Failing(3))
        recorder.connection_made(transport)
        far.send(b"seven b")
        await recorder.receive(b"seven b")
        assert [error.args for error in complaints] == [(3,), (3,), (1,)]


async def test_a_copy_in_another_process_keeps_nothing_awake(epolls):
    """The kernel watches a socket for as long as anybody has it open, and here whoever watched it does not take it back."""
    with joined(tcp=True) as (transport, recorder, far):
        sock = transport.get_extra_info("socket")
        number = sock.fileno()
        with sock.dup():  # as a forked process has it
            transport.abort()
            await recorder.until("lost")
            near, other = socket.socketpair()
            if other.fileno() == number:
                near, other = other, near
            if near.fileno() != number:  # which is free
                with near:
                    near = socket.socket(fileno=os.dup2(near.fileno(), number, inheritable=False))
            near.setblocking(False)
            with other:
                heir = SocketTransport(near, successor := Recorder())
                far.send(b"to nobody")
                far.close()
                assert await told(epolls) <= 3  # two edges, and what the heir is told of its own
                assert not successor.received and not heir.is_closing()
                other.send(b"to the heir")
                await successor.receive(b"to the heir")
                heir.abort()


async def test_ended_by_its_protocol_when_there_is_room_to_write_and_something_to_read():
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    with joined() as (transport, recorder, far):
        recorder.resume_writing = transport.abort
        transport.write(b"x" * 1_000_000)
        await recorder.until("pause")
        transport.pause_reading()
        far.send(b"unread")
        while not transport.is_closing():
            with contextlib.suppress(BlockingIOError):
                far.recv(65_536)
            await asyncio.sleep(0)
        await recorder.until("lost")
        transport.ready(READ)  # of late
        await asyncio.sleep(0)
    assert not complaints


async def test_a_protocol_that_fails_at_once_is_not_watched():
    class Failing(Recorder):
        def connection_made(self, transport):
            raise RuntimeError("no")

    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        with pytest.raises(RuntimeError):
            SocketTransport(near, Failing())
        far.send(b"x")
        await asyncio.sleep(0.01)


async def test_what_it_is():
    with joined(tcp=True) as (transport, recorder, far):
        assert transport.get_extra_info("peername") == far.getsockname()
        assert transport.get_extra_info("sockname") == far.getpeername()
        assert transport.get_extra_info("socket") is not None
        assert transport.get_extra_info("sslcontext", "none") == "none"
        assert transport.can_write_eof()
        other = Recorder()
        assert transport.get_protocol() is recorder
        transport.set_protocol(other)
        far.send(b"x")
        await other.until("data")
