"""What every two-way byte stream must do, in the spirit of trio's ``check_two_way_stream``."""

import hashlib
import random
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import pytest

LARGE = 3 * 1024 * 1024 + 1

BROKEN = (anyio.BrokenResourceError, OSError)


async def check_two_way_stream(make_pair, *, busy=True, half_close=True):
    """Runs every check on fresh pairs, and each both ways round.

    Args:
        make_pair: an async context manager that yields two connected ``anyio.abc.ByteStream``.
        busy: whether a second reader or writer is turned away.
        half_close: whether ``send_eof`` works.
    """

    @asynccontextmanager
    async def turned():
        async with make_pair() as (a, b):
            yield b, a

    checks = [*ALWAYS, *(HALF_CLOSE if half_close else []), *(BUSY if busy else [])]
    for check in checks:
        for make in (make_pair, turned):
            with anyio.fail_after(8):
                async with make() as (a, b):
                    try:
                        await check(a, b)
                    finally:
                        with anyio.CancelScope(shield=True):
                            await anyio.aclose_forcefully(a)
                            await anyio.aclose_forcefully(b)


# Helpers


async def until_end(stream):
    received = bytearray()
    async for chunk in stream:
        assert 1 <= len(chunk) <= 65_536
        received += chunk
    return bytes(received)


async def exactly(stream, size):
    received = bytearray()
    while len(received) < size:
        received += await stream.receive(size - len(received))
    return bytes(received)


async def assert_ended(stream):
    for _ in range(3):
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()


async def fill(stream, limit=32 * 1024 * 1024):
    """Sends until nothing more goes in; how many bytes that were. The rest of the last send is lost."""
    sent = 0
    chunk = bytes(64 * 1024)
    while sent < limit:
        with anyio.move_on_after(0.1) as scope:
            await stream.send(chunk)
            sent += len(chunk)
        if scope.cancelled_caught:
            return sent
    raise AssertionError(f"{sent} bytes went in, and nobody reads")


# Checks


async def bytes_go_both_ways(a, b):
    await a.send(b"ping")
    assert await exactly(b, 4) == b"ping"
    await b.send(b"pong")
    assert await exactly(a, 4) == b"pong"


async def any_buffer_can_be_sent(a, b):
    await a.send(b"bytes,")
    await a.send(bytearray(b"bytearray,"))
    await a.send(memoryview(b"memoryview"))
    assert await exactly(b, 26) == b"bytes,bytearray,memoryview"


async def what_is_sent_may_change_afterwards(a, b):
    data = bytearray(b"before")
    await a.send(data)
    data[:] = b"after!"
    assert await exactly(b, 6) == b"before"


async def nothing_can_be_sent(a, b):
    await a.send(b"")
    await a.send(b"x")
    await a.send(b"")
    assert await b.receive() == b"x"


async def max_bytes_is_kept(a, b):
    await a.send(b"0123456789" * 400)
    received = bytearray()
    for size in (1, 2, 3, 10, 1, 500, 1000, 1):
        chunk = await b.receive(size)
        assert 1 <= len(chunk) <= size
        received += chunk
    received += await exactly(b, 4000 - len(received))
    assert received == b"0123456789" * 400


async def close_is_read_as_end_behind_the_data(a, b):
    await a.send(b"last words")
    await a.aclose()
    assert await until_end(b) == b"last words"
    await assert_ended(b)


async def use_after_close_is_an_error(a, b):
    await a.aclose()
    await a.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await a.send(b"x")
    with pytest.raises(anyio.ClosedResourceError):
        await a.receive()


async def close_wakes_a_reader(a, b):
    async with anyio.create_task_group() as group:

        async def read():
            with pytest.raises(anyio.ClosedResourceError):
                await a.receive()

        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        await a.aclose()


async def sending_to_who_is_gone_fails_in_the_end(a, b):
    await b.aclose()
    with pytest.raises(BROKEN):
        for _ in range(10_000):
            await a.send(bytes(16 * 1024))
            await anyio.sleep(0.001)


async def a_slow_reader_slows_the_sender(a, b):
    sent = await fill(a)
    received = 0
    while received < sent:
        received += len(await b.receive())
    # Room again: it goes on. The send that was given up may have left a part of itself.
    await a.send(b"x")
    while b"x" not in await b.receive():
        pass


async def a_slow_reader_does_not_slow_the_other_way(a, b):
    await fill(a)
    await b.send(b"still here")
    assert await exactly(a, 10) == b"still here"


async def much_goes_both_ways_at_once(a, b):
    async def send(stream, seed):
        dice = random.Random(seed)
        data = dice.randbytes(LARGE)
        position = 0
        while position < LARGE:
            size = dice.choice((1, 10, 100, 1000, 10_000, 100_000, 300_000))
            await stream.send(data[position : position + size])
            position += size
        digests[seed] = hashlib.sha256(data).digest()

    async def receive(stream, seed):
        dice = random.Random(seed + 10)
        digest = hashlib.sha256()
        left = LARGE
        while left:
            chunk = await stream.receive(dice.choice((100, 1000, 10_000, 65_536, 1_000_000)))
            digest.update(chunk)
            left -= len(chunk)
            if dice.random() < 0.05:
                await anyio.sleep(0)
        received[seed] = digest.digest()

    digests, received = {}, {}
    async with anyio.create_task_group() as group:
        group.start_soon(send, a, 1)
        group.start_soon(receive, b, 1)
        group.start_soon(send, b, 2)
        group.start_soon(receive, a, 2)
    assert digests == received


async def cancelled_calls_did_nothing(a, b):
    for call in (lambda: a.send(b"never"), lambda: a.send(b""), a.receive):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await call()
        assert scope.cancelled_caught
    await bytes_go_both_ways(a, b)


async def a_cancelled_receive_loses_nothing(a, b):
    data = random.Random(7).randbytes(400_000)

    async def send():
        for position in range(0, len(data), 999):
            await a.send(data[position : position + 999])
            if position % 7 == 0:
                await anyio.sleep(0)

    received = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(send)
        turn = 0
        while len(received) < len(data):
            turn += 1
            with anyio.move_on_after(0 if turn % 3 else 0.0005):
                received += await b.receive()
            if turn % 50 == 0 and len(received) < len(data):
                received += await b.receive()
    assert received == data


async def a_cancelled_close_closes(a, b):
    with anyio.CancelScope() as scope:
        scope.cancel()
        await a.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await a.send(b"x")
    with pytest.raises((anyio.EndOfStream, *BROKEN)):
        await b.receive()


async def a_half_close_leaves_the_other_half_open(a, b):
    await a.send(b"request")
    await a.send_eof()
    assert await until_end(b) == b"request"
    await assert_ended(b)
    for _ in range(3):
        await b.send(b"answer")
    assert await exactly(a, 18) == b"answer" * 3
    await b.send_eof()
    await assert_ended(a)
    await assert_ended(b)


async def half_closed_means_no_more_sending(a, b):
    await a.send_eof()
    await a.send_eof()
    with pytest.raises((anyio.ClosedResourceError, *BROKEN, RuntimeError)):
        await a.send(b"x")
    await b.send(b"ok")
    assert await exactly(a, 2) == b"ok"


async def the_end_comes_behind_much_data(a, b):
    data = random.Random(3).randbytes(1_000_000)

    async def send():
        await a.send(data)
        await a.send_eof()

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        assert await until_end(b) == data


async def both_half_closed_at_once(a, b):
    await a.send(b"a")
    await b.send(b"b")
    await a.send_eof()
    await b.send_eof()
    assert await until_end(a) == b"b"
    assert await until_end(b) == b"a"


async def an_answer_is_whole_though_the_request_was_not_read(a, b):
    async def ask():
        with pytest.raises(BROKEN):
            for _ in range(10_000):
                await a.send(bytes(16 * 1024))

    answer = random.Random(4).randbytes(300_000)

    async def serve():
        await b.receive()
        await b.send(answer)
        await b.send_eof()

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await a.send(bytes(16 * 1024))
        assert await until_end(a) == answer
    await b.aclose()
    await ask()


async def a_second_reader_is_turned_away(a, b):
    async with anyio.create_task_group() as group:
        group.start_soon(a.receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await a.receive()
        await b.send(b"x")


async def a_second_writer_is_turned_away(a, b):
    async with anyio.create_task_group() as group:

        async def send():
            await a.send(bytes(64 * 1024 * 1024))

        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await a.send(b"x")
        group.cancel_scope.cancel()


ALWAYS = [
    bytes_go_both_ways,
    any_buffer_can_be_sent,
    what_is_sent_may_change_afterwards,
    nothing_can_be_sent,
    max_bytes_is_kept,
    close_is_read_as_end_behind_the_data,
    use_after_close_is_an_error,
    close_wakes_a_reader,
    sending_to_who_is_gone_fails_in_the_end,
    a_slow_reader_slows_the_sender,
    a_slow_reader_does_not_slow_the_other_way,
    much_goes_both_ways_at_once,
    cancelled_calls_did_nothing,
    a_cancelled_receive_loses_nothing,
    a_cancelled_close_closes,
]
HALF_CLOSE = [
    a_half_close_leaves_the_other_half_open,
    half_closed_means_no_more_sending,
    the_end_comes_behind_much_data,
    both_half_closed_at_once,
    an_answer_is_whole_though_the_request_was_not_read,
]
BUSY = [a_second_reader_is_turned_away, a_second_writer_is_turned_away]
