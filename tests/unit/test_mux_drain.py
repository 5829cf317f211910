"""Leaving: GOAWAY twice, the grace, and what becomes of streams meanwhile."""

import pytest

from konnektor.errors import Code, SessionClosedError
from konnektor.frames import Goaway, Open, Refuse
from tests.pair import Pair
from tests.unit.test_mux_streams import frames_of, kinds


def test_drain_of_an_empty_session():
    pair = Pair()
    pair.client.mux.drain(25, pair.now, reason="restart")
    assert kinds(pair.client) == [Goaway]
    pair.pump()
    pair.sleep(0.2)
    assert ("goaway", Code.SHUTDOWN, 25.0, "restart") in pair.server.events
    assert pair.server.events[-1] == pair.client.events[-1] == ("closed", "ShutdownError")


def test_two_phases():
    pair = Pair()
    _ours, _theirs = pair.open()
    pair.client.mux.drain(25, pair.now)
    crossing = pair.server.open()  # the server has not read GOAWAY
    pair.server.flush()
    pair.client.flush()
    pair.server.deliver()
    pair.client.deliver()
    assert pair.client.opened[-1].id == crossing.id == 2
    pair.client.opened[-1].accept()
    pair.sleep(0.2)
    assert crossing.sink.kinds == ["accepted"]
    assert pair.client.mux.leaving.last_taken == 2
    pair.client.inject()
    pair.server.inject(Open(4, 1, "x"))  # a peer that does not listen
    assert frames_of(pair.client)[-1] == Refuse(4, Code.LIMIT, 0, "this side is draining")
    with pytest.raises(SessionClosedError, match="draining"):
        pair.server.open()


def test_an_open_above_the_last_id_is_settled_by_its_refusal():
    pair = Pair()
    crossing = pair.server.open()
    crossing.write(b"early")
    pair.server.flush()  # and is so long on its way that the second GOAWAY does not wait for it
    pair.client.mux.drain(60, pair.now)
    pair.client.flush()
    pair.sleep(5.1, pump=False)
    said = [(f.last_id, f.code) for f in frames_of(pair.client) if isinstance(f, Goaway)]
    assert said == [(2**32 - 1, Code.SHUTDOWN), (0, Code.SHUTDOWN)]
    pair.client.deliver()
    assert pair.server.mux.draining and not crossing.sink.events
    pair.pump()
    assert not pair.client.opened
    assert crossing.sink.events == [("failed", "LimitError", True, True), ("closed",)]
    assert crossing.sink.error.refused and crossing.sink.error.retryable
    pair.sleep(0.2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


def test_drain_waits_for_streams():
    pair = Pair()
    ours, theirs = pair.open()
    pair.client.mux.drain(25, pair.now)
    pair.sleep(10)
    ours.write(b"x" * 50_000)
    ours.finish()
    theirs.finish()
    pair.pump()
    assert theirs.sink.kinds[-2:] == ["eof", "closed"]
    pair.sleep(0.2)
    assert pair.client.error.code == Code.SHUTDOWN


def test_drain_grace_over():
    pair = Pair()
    ours, theirs = pair.open()
    pending, undecided = pair.open(pair.server, accept=False)
    half, _ = pair.open()
    half.finish()
    pair.client.mux.drain(2, pair.now)
    pair.client.mux.drain(50, pair.now)  # cannot make it longer
    pair.sleep(1.9)
    assert ours.sink.kinds == ["accepted"]
    pair.sleep(0.2)
    assert ours.sink.events[1] == ("failed", "ShutdownError", True, True)
    assert half.sink.events[1] == ("failed", "ShutdownError", True, False)
    assert undecided.sink.events[0] == ("failed", "ShutdownError", True, True)
    assert pending.sink.error.code == Code.LIMIT and pending.sink.error.refused
    assert theirs.sink.kinds[-1] == "closed"
    pair.sleep(0.2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


def test_drain_of_a_peer_that_answers_nothing():
    pair = Pair()
    ours, _ = pair.open()
    pair.server.blocked = True
    pair.client.mux.drain(2, pair.now)
    pair.sleep(2.1)
    assert ours.sink.kinds == ["accepted", "failed"]
    pair.sleep(5.1)
    assert pair.client.error.code == Code.SHUTDOWN


def test_second_goaway_does_not_wait_for_ever():
    pair = Pair()
    pair.open()
    pair.server.blocked = True
    pair.client.mux.drain(60, pair.now)
    pair.sleep(4.9)
    assert pair.client.mux.leaving.last_taken is None
    pair.sleep(0.2)
    assert pair.client.mux.leaving.last_taken == 0


def test_both_drain():
    pair = Pair()
    pair.open()
    for side in pair.sides:
        side.mux.drain(1, pair.now)
    pair.sleep(2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


@pytest.mark.parametrize("who", [0, 1])
def test_drain_before_hello(who):
    pair = Pair(hello=False)
    pair.sides[who].mux.drain(1, pair.now)
    pair.sleep(2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


def test_drain_of_a_server_that_never_hears_of_its_client():
    pair = Pair(hello=False)
    pair.client.blocked = True
    pair.server.mux.drain(1, pair.now)
    pair.sleep(6.1)
    assert pair.server.error.code == Code.SHUTDOWN


def test_drain_fails_waiting_opens():
    pair = Pair()
    for _ in range(8):
        pair.open()
    mine, also = pair.client.open(), pair.client.open()
    pair.server.mux.drain(5, pair.now)
    pair.pump()
    assert [s.sink.events for s in (mine, also)] == [[("failed", "LimitError", True, True), ("closed",)]] * 2
    assert mine.sink.error.refused


def test_drain_again_and_after_the_end():
    pair = Pair()
    pair.client.mux.drain(5, pair.now)
    pair.client.mux.drain(0, pair.now)
    pair.sleep(1)
    assert pair.client.error is not None
    pair.client.mux.drain(5, pair.now)
    pair.client.mux.handle_timeout(pair.now)
    assert pair.client.mux.next_deadline() is None
