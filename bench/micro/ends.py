"""Two multiplexers joined in memory, with nothing around them that costs time."""

from __future__ import annotations

from konnektor.errors import PeerError, SessionError
from konnektor.frames import Feature, Resume
from konnektor.limits import MIB, Limits
from konnektor.mux import Mux
from konnektor.mux_stream import MuxStream
from konnektor.settings import Settings

__all__ = ["End", "Joined"]

TURN = 1e-4
"""Seconds that the clock moves each time bytes are carried: it is the limits against abuse that know of time."""


class Echo:
    """A sink that sends back what comes."""

    def __init__(self, stream: MuxStream | None = None) -> None:
        self.stream = stream
        self.received = 0

    def accepted(self) -> None:
        pass

    def data_received(self, data: memoryview) -> None:
        assert self.stream is not None
        size = len(data)
        self.received += size
        self.stream.write(bytes(data))
        self.stream.consumed(size)

    def eof_received(self) -> None:
        assert self.stream is not None
        self.stream.finish()

    def writable(self) -> None:
        pass

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        raise error

    def closed(self) -> None:
        assert self.stream is not None
        self.stream.release()  # nobody else needs it, and the peer may open another

    def datagram_received(self, data: memoryview) -> None:
        pass


class Drop(Echo):
    """A sink that only counts."""

    def data_received(self, data: memoryview) -> None:
        assert self.stream is not None
        self.received += len(data)
        self.stream.consumed(len(data))


class End:
    """A multiplexer's handler; streams that the peer opens get ``kind`` for a sink."""

    def __init__(self, role: str, limits: Limits, kind: type[Echo]) -> None:
        self.kind = kind
        settings = Settings.of(limits, features=Feature.DATAGRAM)
        self.mux = Mux(role, self, limits, settings, nonce=role[0].encode() * 32, now=0.0)  # type: ignore[arg-type]
        self.mux.start()

    def output_pending(self) -> None:
        pass

    def deadline_moved(self, when: float) -> None:
        pass

    def hello_received(self, settings: Settings) -> None:
        pass

    def stream_opened(self, stream: MuxStream) -> None:
        stream.sink = self.kind(stream)
        stream.accept()

    def pong_received(self, opaque: int, rtt: float) -> None:
        pass

    def goaway_received(self, code: int, grace: float, reason: str) -> None:
        pass

    def resume_requested(self, frame: Resume, nonces: bytes) -> None:
        pass

    def session_closed(self, error: SessionError) -> None:
        raise error

    def connection_dead(self, reason: str) -> None:
        raise AssertionError(reason)


class Joined:
    """A client and a server after HELLO, with so many streams open and idle."""

    def __init__(self, streams: int = 0, *, kind: type[Echo] = Echo) -> None:
        limits = Limits(initial_streams=streams + 1024, receive_pool=1024 * MIB)
        self.now = 0.0
        self.client, self.server = (End(role, limits, kind) for role in ("client", "server"))
        self.carry()
        self.idle = [self.open() for _ in range(streams)]
        for stream in self.idle:
            stream.write(b"x")  # each has been used
        self.carry()

    def open(self) -> MuxStream:
        sink = Drop()
        sink.stream = self.client.mux.open("bench@bench", b"", sink, now=self.now)
        return sink.stream

    def carry(self) -> None:
        """Until neither end has more to say; a batch each in turn, as over a connection."""
        ends = (self.client.mux, self.server.mux)
        while any(mux.awake for mux in ends):
            for mux, peer in (ends, ends[::-1]):
                if mux.awake:
                    data = mux.data_to_send(self.now)
                    assert peer.receive(data, self.now) == len(data)
            self.now += TURN
