"""Two multiplexers, what an application does at either end, and what the world does to their connection."""

import contextlib
from collections.abc import Callable

from konnektor.errors import KonnektorError, LocalProtocolError, ResumeRefusedError, StreamClosedError
from konnektor.limits import KIB, Limits
from konnektor.mux import BATCH
from konnektor.states import Receiving, Sending
from tests import pair as crossed
from tests.link import PIECE, Link

LIMITS = (
    Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=320 * KIB, ack_bytes=8 * KIB),
    Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=256 * KIB, ack_bytes=1, replay_buffer=256 * KIB),
    Limits(initial_window=64 * KIB, initial_streams=16, receive_pool=4096 * KIB, max_frame=16_376),
)
CODES = (0, 1, 5, 11, 32, 39, 40, 2**31, 2**32 - 1)
SLEEPS = (0.001, 0.03, 0.5, 3.0, 6.0, 20.0, 70.0)
DELAYS = (0.0, 0.001, 0.05, 0.5)
RATES = (50e3, 1e6, 1e8)


class Program:
    """The bytes of an input, read one after another; beyond the end they are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pos = 0

    @property
    def over(self) -> bool:
        return self._pos >= len(self._data)

    def take(self, size: int) -> bytes:
        data = self._data[self._pos : self._pos + size]
        self._pos += size
        return data

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size).ljust(size, b"\0"), "big")

    def choice(self, options):
        return options[self.number() % len(options)]

    def size(self) -> int:
        """Mostly small, up to 65,408."""
        kind = self.number()
        return kind if kind < 200 else (kind - 199) * 1168

    def near(self, right: int) -> int:
        """A number that is right, or nearly, or anything."""
        kind = self.number()
        if kind < 16:
            return max(0, right + kind - 4)
        return self.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, self.number(8)))


class Newcomer(crossed.Newcomer):
    """The server's side of a new connection, which a liar may take for a session of its own."""

    def hello_received(self, settings):
        pass

    def stream_opened(self, stream):
        stream.sink = crossed.Recorder()
        stream.refuse(39)

    def pong_received(self, opaque, rtt):
        pass

    def goaway_received(self, code, grace, reason):
        pass

    def connection_dead(self, reason):
        raise AssertionError("dead before it was alive")


class Stage:
    """Both sides, what is known of each stream, and the operations."""

    def __init__(self, program: Program) -> None:
        self.program = program
        mode = program.number()
        self.pair = crossed.Pair(
            program.choice(LIMITS), program.choice(LIMITS), hello=not mode & 1, resumable=not mode & 2
        )
        self.lied = False
        """Whether a side has been told what its peer would never say."""
        self.over = False
        """Whether the session may end for good reasons."""
        self.written: dict[object, bytearray] = {}
        self.marred: set[object] = set()
        """Ends of streams that somebody broke off, or that time may have."""
        self.byte = 0
        for side in self.pair.sides:
            side.auto = bool(mode & 4)
            side.on_open = (None, self._take, self._refuse, self._drop)[mode >> 3 & 3]
            side.sink_on = self._reactions(mode >> 5 & 3)

    # Who is meant

    def side(self):
        return self.pair.sides[self.program.number() & 1]

    def stream(self):
        """One of a side's streams, if it has any: its newest ones, of which there may be more than the peer allows."""
        newest = self.side().all[-12:]
        return self.program.choice(newest) if newest else None

    def far_ends(self, stream):
        """The other end of a stream, if it is there: among the peer's streams the one of this id."""
        side = next(side for side in self.pair.sides if stream in side.all)
        return [other for other in side.peer.all if other.id == stream.id and stream.id]

    # What an application does

    def open(self) -> None:
        side = self.side()
        name = self.program.choice(("echo", "udp"))
        with contextlib.suppress(KonnektorError):
            stream = side.open(
                name,
                self.program.take(self.program.number() % 8),
                auto=side.auto,
                on={event: call for event, call in side.sink_on.items() if event != "data"},  # or it goes to and fro
                priority=self.program.number() % 3,
                deadline=self.program.choice((None, None, 0.2, 5.0, 0.0)),
                datagrams=name == "udp",
            )
            if stream.deadline < self.pair.now + 10:
                self.marred.add(stream)

    def answer(self) -> None:
        stream = self.stream()
        if stream is None:
            return
        with contextlib.suppress(LocalProtocolError):
            if self.program.number() & 3:
                stream.accept(self.program.take(self.program.number() % 8))
            else:
                self.marred.add(stream)
                stream.refuse(self.program.choice(CODES), "no", retry_after=self.program.number())

    def write(self) -> None:
        stream = self.stream()
        if stream is None:
            return
        self.byte = (self.byte + 1) % 256
        data = bytes([self.byte]) * self.program.size()
        with contextlib.suppress(LocalProtocolError, StreamClosedError):
            self.write_to(stream, data)

    def write_to(self, stream, data: bytes) -> None:
        """Writes, and remembers what."""
        stream.write(data)
        self.written.setdefault(stream, bytearray()).extend(data)

    def _take(self, stream) -> None:
        stream.accept()
        self.write_to(stream, b"hello" * 100)

    def _refuse(self, stream) -> None:
        self.marred.add(stream)
        stream.refuse(40, "no")
        stream.release()

    def _drop(self, stream) -> None:
        self.marred.add(stream)
        stream.cancel()
        stream.release()

    def _reactions(self, kind: int) -> dict[str, Callable[..., None]]:
        """What a sink does of itself when it is told something."""

        def write(stream):
            with contextlib.suppress(LocalProtocolError, StreamClosedError):
                self.write_to(stream, bytes(3000))

        def finish(stream):
            with contextlib.suppress(LocalProtocolError):
                stream.finish()

        return (
            {},
            {"eof": finish},
            {"failed": lambda stream: stream.cancel(), "closed": lambda stream: stream.release()},
            {"data": write, "writable": write, "accepted": write},
        )[kind]

    def send_datagram(self) -> None:
        stream = self.stream()
        if stream is not None:
            with contextlib.suppress(LocalProtocolError, StreamClosedError):
                stream.send_datagram(bytes(self.program.size()))

    def finish(self) -> None:
        stream = self.stream()
        if stream is not None:
            with contextlib.suppress(LocalProtocolError):
                stream.finish()

    def break_off(self) -> None:
        stream = self.stream()
        if stream is not None:
            self.marred.add(stream)
            getattr(stream, self.program.choice(("reset", "stop", "cancel")))(self.program.choice(CODES))

    def consume(self) -> None:
        stream = self.stream()
        if stream is not None:
            stream.consumed(self.program.size())

    def let_go(self) -> None:
        stream = self.stream()
        if stream is not None:
            self.marred.add(stream)
            stream.cancel()
            stream.release()

    def hint(self) -> None:
        stream = self.stream()
        if stream is not None:
            stream.prioritize(self.program.number() % 3, 1 + self.program.number() % 255)
            stream.want_room(self.program.size())

    def ping(self) -> None:
        self.side().mux.ping()

    def leave(self) -> None:
        self.over = True
        side = self.side()
        if self.program.number() & 1:
            side.mux.drain(self.program.choice((0.0, 1.0, 100.0)), self.pair.now)
        else:
            side.mux.close(self.program.choice(CODES), "enough")

    # What the world does

    def flush(self) -> None:
        self.side().flush(self.program.choice((64, 1000, 16 * KIB, BATCH)))

    def deliver(self) -> None:
        side = self.side()
        self._deliver(side, self.program.size())

    def _deliver(self, side, count: int) -> None:
        if side.peer.gone and side.peer.machine is side.peer.mux:
            side.wire.clear()  # nobody reads that connection
        side.deliver(min(count, len(side.wire)))

    def exchange(self) -> None:
        """Everything moves, until nothing does."""
        for _ in range(1000):
            moved = False
            for side in self.pair.sides:
                side.flush()
                moved = moved or bool(side.wire)
                self._deliver(side, 20_000)
            if not moved:
                return
        raise AssertionError("bytes move for ever")

    def block(self) -> None:
        side = self.side()
        if side.gone:
            return
        if side.blocked:
            self.unblock()
        else:
            side.blocked = True
            side.mux.write_blocked(self.pair.now)

    def unblock(self) -> None:
        for side in self.pair.sides:
            if side.blocked:
                side.blocked = False
                side.mux.write_resumed()
            side.pending = side.pending or (side.machine.awake and not (side.gone and side.machine is side.mux))

    def sleep(self) -> None:
        seconds = self.program.choice(SLEEPS)
        pump = bool(self.program.number() & 1)
        if not self.lied and seconds > 0.1:
            # Whom the world keeps from answering for long would rightly be given up.
            self.unblock()
            pump = True
            self.over = self.over or (self.pair.client.dead and seconds > 1)
        self._expect(seconds)
        self.pass_time(self.pair.now + seconds, pump=pump)

    def travel(self) -> None:
        """Time passes on a path with a delay and a rate; what is under way at its end comes later, or is cut."""
        delay, rate = self.program.choice(DELAYS), self.program.choice(RATES)
        # One round brings a piece at least, or many of them would be a silence.
        seconds = (1 + self.program.number() % 4) * (2 * delay + PIECE / rate)
        if any(side.gone or side.dead or side.machine is not side.mux for side in self.pair.sides):
            return
        self.unblock()
        self._expect(seconds)
        link = Link(self.pair, delay=delay, rate=rate, queue=64 * KIB, watch=self.notice)
        link.run(seconds)
        link.stop()

    def _expect(self, seconds: float) -> None:
        """What so much time may do to streams, and a session, that wait for somebody."""
        for side in self.pair.sides:
            for stream in side.all:
                if stream.sending in (Sending.UNSENT, Sending.UNDECIDED) or stream.receiving is Receiving.AWAITING:
                    self.marred.add(stream)
                if stream.receiving in (Receiving.DISCARDING, Receiving.GIVEN_UP):
                    self.over = self.over or seconds > 1

    def pass_time(self, end: float, *, pump: bool) -> None:
        pair = self.pair
        for _ in range(2000):
            if pump:
                self.exchange()
            timers = [(side.timer, side) for side in pair.sides if side.timer is not None and side.error is None]
            when, side = min(timers, key=lambda timer: timer[0], default=(None, None))
            if when is None or when > end:
                pair.now = end
                return
            pair.now = max(pair.now, when)
            pair.fire(side)
            self.notice()
        raise AssertionError("timers without end")

    def cut(self) -> None:
        """The connection breaks; some of what was under way arrives; one side may not notice."""
        notice = self.program.choice((("client", "server"), ("server", "client"), ("client",)))
        for side in self.pair.sides:
            self._deliver(side, self.program.size())
            side.wire.clear()
            side.dead = True
        for name in notice:
            self._lose(getattr(self.pair, name))

    def _lose(self, side) -> None:
        machine = side.machine
        side.blocked = False
        possible = side.mux.resumption.possible
        if not side.gone:
            side.lose()
        side.machine = side.mux
        if not possible and side.error is None:
            self.over = True
            side.mux.connection_lost("cut")
        if machine is not side.mux and hasattr(machine, "connection_lost"):
            machine.connection_lost("cut")

    def notice(self) -> None:
        """Who has ended or dropped the connection is soon known to the client, which asks for another."""
        pair = self.pair
        for side in pair.sides:
            if side.gone and side.machine is side.mux and not side.dead:
                for each in pair.sides:
                    each.wire.clear()
                    each.dead = True
        client = pair.client
        if client.dead and not client.gone and client.machine is client.mux:
            self._lose(client)
        if client.error is not None and client.machine is not client.mux:
            # As Session.session_closed has it: the attempt is given up, and the server hears of that.
            client.machine.close(client.error.code, client.error.reason)
            client.pending = True

    def reconnect(self) -> None:
        """A new connection, and a few bytes on it, or all that it takes."""
        pair = self.pair
        if not self.connect():
            return
        if self.program.number() & 1:
            self.unblock()
            self.exchange()
            self._settle_attempt()
            return
        for _ in range(self.program.number() % 6):
            side = self.side()
            side.flush()
            self._deliver(side, self.program.size())
        if self.program.number() & 1:
            for side in pair.sides:
                side.wire.clear()
                side.dead = True
            self._lose(pair.client)
            self._settle_attempt()

    def connect(self) -> bool:
        pair = self.pair
        client, server = pair.client, pair.server
        if client.error is not None or not client.mux.resumption.possible:
            return False
        if client.machine is not client.mux or not client.gone:
            self._lose(client)
        if client.error is not None:
            return False
        client.rejoin_error = None
        # Pair.reconnect, with a newcomer that bears lies.
        pair.reconnect()
        newcomer = Newcomer(server)
        server.machine = newcomer.mux
        newcomer.mux.start()
        return True

    def _settle_attempt(self) -> None:
        """What a session does after an attempt that failed."""
        client = self.pair.client
        error = getattr(client, "rejoin_error", None)
        if error is None:
            return
        client.rejoin_error = None
        client.machine = client.mux
        if isinstance(error, ResumeRefusedError):
            assert self.lied or self.over
            client.mux.end(error, None)
        for side in self.pair.sides:
            side.wire.clear()
            side.dead = True
