"""What a liar does: frames that the peer's multiplexer would not send, bytes damaged on their way, proofs by who has the ticket."""

from fuzz.stage import CODES, Stage
from konnektor import frames
from konnektor.frames import Frame, HelloTLV


class Liar(Stage):
    """A stage on which one side may be told anything."""

    def lie(self) -> None:
        """A frame that the peer's multiplexer would not send now."""
        side = self.side()
        data = self._frame(side).encode()
        if self.program.number() & 1:
            changed = bytearray(data)
            for _ in range(1 + self.program.number() % 3):
                changed[self.program.number() % min(len(changed), 64)] = self.program.number()
            data = bytes(changed)
        self._tell(side, data)

    def babble(self) -> None:
        side = self.side()
        self._tell(side, self.program.take(self.program.number(2) % 1200))

    def flood(self) -> None:
        """The same frame again and again."""
        side = self.side()
        self._tell(side, self._frame(side).encode() * (2 * self.program.number()))

    def damage(self) -> None:
        """Bytes on the wire change, come twice, or not at all."""
        side = self.side()
        if not side.wire:
            return
        self._lie()
        where = self.program.number(2) % len(side.wire)
        match self.program.number() % 3:
            case 0:
                side.wire[where] = self.program.number()
            case 1:
                side.wire[where:where] = side.wire[where : where + self.program.number()]
            case _:
                del side.wire[where : where + self.program.number()]

    def forge(self) -> None:
        """RESUME or RESUMED from somebody who holds the ticket, with counts of his own."""
        if not self.connect():
            return
        self._lie()
        client, server = self.pair.client, self.pair.server
        if self.program.number() & 1:
            ticket, flight = server.mux.resumption.ticket, server.mux.flight
            if ticket is None:
                return
            hello = frames.Hello(1, 1, b"x" * 32, {int(HelloTLV.RESUME_INTENT): b""})
            attempt = self.program.near(ticket.attempt + 1) % 2**32
            seq = self.program.near(flight.acked if self.program.number() & 1 else flight.sent) % 2**64
            mac = ticket.client_mac(attempt, seq, b"x" * 32 + b"n" * 32)
            client.machine = client.mux  # it is not in this
            client.pending = False
            self._tell(server, hello.encode())
            self._tell(server, frames.Resume(ticket.session_id, attempt, seq, mac).encode())
        else:
            ticket, flight = client.mux.resumption.ticket, client.mux.flight
            self._tell(client, frames.Hello(1, 1, b"y" * 32).encode())
            seq = self.program.near(flight.acked if self.program.number() & 1 else flight.sent) % 2**64
            mac = ticket.server_mac(ticket.attempt, seq, b"c" * 32 + b"y" * 32)
            self._tell(client, frames.Resumed(seq, mac).encode())
            self._settle_attempt()

    def _lie(self) -> None:
        self.lied = self.over = True
        for side in self.pair.sides:
            side.deceived = True

    def _tell(self, side, data: bytes) -> None:
        self._lie()
        if not (side.gone and side.machine is side.mux):
            side.peer.carry(data)

    def _id(self, side) -> int:
        kind = self.program.number()
        if kind < 24:
            return kind
        if kind < 200 and side.mux.streams:
            return list(side.mux.streams)[kind % len(side.mux.streams)]
        return side.mux.admission.next_peer_id if kind < 240 else self.program.number(4)

    def _tlvs(self) -> dict[int, bytes]:
        return {
            self.program.number(): self.program.take(self.program.number() % 40)
            for _ in range(self.program.number() % 4)
        }

    def _frame(self, side) -> Frame:
        program, mux = self.program, side.mux
        number, take, near = program.number, program.take, program.near
        stream_id = self._id(side)
        stream = mux.streams.get(stream_id)
        received, granted = (stream.receive_window.received, stream.receive_window.granted) if stream else (0, 0)
        limit = stream.send_window.limit if stream else 0
        text = str(take(number() % 16), "latin-1")
        match number() % 18:
            case 0 | 1:
                size = min(near(granted - received), 65_535) if number() & 1 else number()
                return frames.Data(stream_id, bytes(size), number() & 3)
            case 2:
                opened = mux.admission.next_peer_id if number() & 7 else stream_id
                return frames.Open(opened, number() % 3, program.choice(("echo", "udp")), self._tlvs())
            case 3:
                return frames.Accept(stream_id, self._tlvs())
            case 4:
                return frames.Refuse(stream_id, program.choice(CODES), number(4), text)
            case 5:
                return frames.Reset(stream_id, program.choice(CODES), near(received) % 2**64, text)
            case 6:
                return frames.Stop(stream_id, program.choice(CODES))
            case 7:
                return frames.Credit(stream_id, near(limit) % 2**64)
            case 8:
                return frames.Streams(near(mux.admission.allowed) % 2**64)
            case 9:
                return frames.Goaway(near(mux.admission.next_id) % 2**32, program.choice(CODES), number(4), text)
            case 10:
                return frames.Hello(number() % 3, 2, take(32).ljust(32), self._tlvs())
            case 11:
                return frames.Resume(take(16).ljust(16), number(4), number(8), take(32).ljust(32))
            case 12:
                return frames.Resumed(number(8), take(32).ljust(32))
            case 13:
                return frames.Ack(near(mux.flight.sent) % 2**64)
            case 14:
                return frames.Ping(number()) if number() & 1 else frames.Pong(near(mux.liveness._ping_count), number(8))
            case 15:
                return frames.Datagram(stream_id, number() & 1, bytes(program.size()))
            case 16:
                return frames.Close(program.choice(CODES), text)
            case _:
                return frames.Priority(stream_id, number() % 3, number())
