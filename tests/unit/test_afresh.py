"""A session that is not to be had any more: another begins on the connection that was to resume it."""

import pytest

from konnektor.errors import Code, ResumeRefusedError
from konnektor.frames import Data, Hello, HelloTLV, Ping, Resume, Resumed, scan
from konnektor.rejoin import Rejoin
from tests.pair import Pair

NONCE = b"c" * 32


class Restarted(Pair):
    """A new server, and a client that asks it for a session of another one's; it has a new session ready.

    Attributes:
        old: the other pair, whose client is suspended.
        rejoin: what the client's end of the connection goes to first.
    """

    def __init__(self, *, offered=True):
        self.old = Pair(resumable=True)
        self.stream, _ = self.old.open()
        self.old.cut()
        super().__init__(hello=False, resumable=True)
        self.began = False
        self.failed = []
        self.client.pending = False
        self.client.wire.clear()
        self.rejoin = Rejoin(self.old.client.mux, self, NONCE, self.client.mux if offered else None)
        self.client.machine = self.rejoin
        self.output_pending()

    # RejoinHandler

    def output_pending(self):
        self.client.pending = True

    def began_afresh(self):
        self.began = True
        self.client.machine = self.client.mux
        self.client.pending = True

    def rejoin_failed(self, error):
        self.failed.append(error)
        self.client.pending = self.rejoin.awake


def check(pair):
    """The new session is up, and like any other."""
    assert pair.began and not pair.failed
    assert isinstance(pair.rejoin.error, ResumeRefusedError)
    for side in pair.sides:
        assert side.kinds[0] == "hello"
        side.check()
    stream, theirs = pair.open()
    stream.write(b"to and")
    theirs.write(b"fro")
    pair.pump()
    assert (bytes(theirs.sink.data), bytes(stream.sink.data)) == (b"to and", b"fro")


def test_another_session_begins_on_the_same_connection():
    pair = Restarted()
    pair.pump()
    check(pair)
    assert pair.old.client.gone  # whose end is its owner's business


def test_it_can_be_resumed_in_its_turn():
    pair = Restarted()
    pair.pump()
    stream, theirs = pair.open()
    stream.write(b"kept")
    pair.cut()
    pair.resume()
    assert bytes(theirs.sink.data) == b"kept"


@pytest.mark.parametrize("size", [1, 7, 8, 9, 50])
def test_in_pieces(size):
    pair = Restarted()
    pair.pump([size])
    check(pair)


def test_cut_after_every_byte():
    """Whatever arrived: the connection is lost, and neither session is worse off than without it."""
    whole = Restarted()
    total = 0
    while any(side.pending or side.wire for side in whole.sides):
        for side in whole.sides:
            side.flush()
            total += len(side.wire)
            side.deliver()
    assert whole.began
    for budget in range(total):
        pair = Restarted()
        left = budget
        while left:
            for side in pair.sides:
                side.flush()
                part = min(len(side.wire), left)
                side.deliver(part)
                left -= part
        assert pair.old.client.gone
        if pair.began:
            assert pair.client.mux.established
        else:
            pair.rejoin.connection_lost("cut")
            (error,) = pair.failed
            assert not isinstance(error, ResumeRefusedError)  # to be tried again


def wire(side):
    return [frame for frame, _ in scan(bytes(side.wire))]


def test_what_is_said():
    pair = Restarted()
    pair.client.flush()
    (intent,) = wire(pair.client)
    assert intent.nonce == NONCE
    assert {HelloTLV.RESUME_INTENT, HelloTLV.AFRESH} <= intent.tlvs.keys()
    pair.client.deliver()
    pair.server.flush()
    (first,) = wire(pair.server)
    assert HelloTLV.SESSION_ID not in first.tlvs
    pair.server.deliver()
    pair.client.flush()
    assert [type(frame) for frame in wire(pair.client)] == [Resume]
    pair.client.deliver()
    pair.server.flush()
    second = wire(pair.server)[0]
    assert isinstance(second, Hello)
    assert {HelloTLV.SESSION_ID, HelloTLV.RESUME_KEY} <= second.tlvs.keys()


def test_a_client_that_has_nothing_else_is_refused():
    pair = Restarted(offered=False)
    pair.pump()
    (error,) = pair.failed
    assert isinstance(error, ResumeRefusedError)
    assert pair.server.error.code == Code.RESUME_REFUSED


@pytest.mark.parametrize("between", [Ping(1), Data(1, b"x"), Resumed(0, bytes(32)), Hello(1, 1, bytes(32))], ids=repr)
def test_the_client_keeps_to_the_order(between):
    """After RESUME a server's HELLO is an answer; before it, and everything else, is PROTOCOL as ever."""
    pair = Restarted(offered=not isinstance(between, Hello))
    hello = Hello(1, 1, b"s" * 32).encode()
    pair.rejoin.receive(hello, pair.now)
    pair.rejoin.receive(between.encode(), pair.now)
    (error,) = pair.failed
    assert error.code == Code.PROTOCOL
    assert not pair.began


def test_settings_that_are_none_are_an_offence():
    pair = Pair(hello=False, resumable=True)
    tlvs = {int(HelloTLV.RESUME_INTENT): b"", int(HelloTLV.AFRESH): b"", int(HelloTLV.FEATURES): b"short"}
    pair.client.inject(Hello(1, 1, NONCE, tlvs), Resume(bytes(16), 1, 0, bytes(32)))
    assert pair.server.error.code == Code.PROTOCOL
    assert "FEATURES" in str(pair.server.error)


def test_a_hello_without_intent_offers_nothing():
    """AFRESH alone is a setting like one that nobody knows."""
    pair = Pair(hello=False, resumable=True)
    pair.client.inject(Hello(1, 1, NONCE, {int(HelloTLV.AFRESH): b""}))
    assert pair.server.mux.established
    pair.client.inject(Resume(bytes(16), 1, 0, bytes(32)))
    assert pair.server.error.code == Code.PROTOCOL


def test_a_second_resume_is_none():
    pair = Restarted()
    pair.pump()
    pair.client.inject(Resume(bytes(16), 1, 0, bytes(32)))
    assert pair.server.error.code == Code.PROTOCOL


def test_whoever_begins_afresh_may_be_turned_away():
    """It is told no more than that the old session is lost: else it would go on asking for that, until the grace is over."""
    pair = Restarted()
    pair.server.on["hello"] = lambda side: side.mux.close(Code.IDENTITY, "another process is connected as w")
    pair.pump()
    assert pair.server.error.code == Code.IDENTITY  # for this side's log
    assert not pair.began
    (error,) = pair.failed
    assert isinstance(error, ResumeRefusedError)
