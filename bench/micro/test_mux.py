"""The multiplexer in memory: what a round trip, a stream and a byte cost, and whether other streams make it dearer."""

from __future__ import annotations

import pytest

from bench.micro.ends import Drop, Joined
from konnektor.limits import KIB, MIB

OPEN = (1, 100, 10_000)


@pytest.mark.parametrize("streams", OPEN)
def test_round_trip_of_64_bytes(benchmark, streams):
    """There and back over one stream, while others are open and idle: the cost per frame is to be flat."""
    ends = Joined(streams)
    stream = ends.open()
    message = bytes(64)

    def once():
        stream.write(message)
        ends.carry()

    benchmark(once)
    assert stream.sink.received >= 64 and stream.sink.received % 64 == 0


@pytest.mark.parametrize("streams", OPEN)
def test_a_message_on_each_of_100_streams(benchmark, streams):
    """In one turn, there and back: what batching makes of a frame."""
    ends = Joined(streams)
    busy = [ends.open() for _ in range(100)]
    message = bytes(64)

    def once():
        for stream in busy:
            stream.write(message)
        ends.carry()

    benchmark(once)
    assert all(stream.sink.received >= 64 for stream in busy)


@pytest.mark.parametrize("streams", OPEN)
def test_a_mebibyte(benchmark, streams):
    """One way, in pieces of 64 KiB."""
    ends = Joined(streams, kind=Drop)
    stream = ends.open()
    piece = bytes(64 * KIB)

    def once():
        for _ in range(MIB // len(piece)):
            stream.write(piece)
            ends.carry()

    benchmark(once)
    (received,) = [each.sink.received for each in ends.server.mux.streams.values() if each.sink.received > 1]
    assert received % MIB == 0


@pytest.mark.parametrize("streams", OPEN)
def test_open_use_and_close(benchmark, streams):
    """OPEN, ACCEPT, a message each way, FIN each way."""
    ends = Joined(streams)

    def once():
        stream = ends.open()
        stream.write(b"hello")
        stream.finish()
        ends.carry()
        return stream

    assert benchmark(once).forgotten
    assert len(ends.client.mux.streams) == streams
