"""Sinks that keep what they are given until all that came in the same read has been taken in."""

import pytest

from konnektor.errors import Code
from konnektor.frames import Close, Data, DataFlag, Ping, Reset
from tests.pair import Pair, Recorder


class Gatherer(Recorder):
    """Uses what it is given when it is told to, and not before."""

    def __init__(self, *, fails=False):
        super().__init__()
        self.views = []
        self.fails = fails

    def data_received(self, data):
        if not self.views:
            self.stream.gather(self.deliver)
        self.views.append(data)

    def deliver(self):
        views, self.views = self.views, []
        if self.fails:
            raise RuntimeError("a sink's defect")
        for view in views:
            super().data_received(view)
            self.ended = False  # of the stream, by now; not of this view

    # An end may come in the same read.

    def eof_received(self):
        self.deliver()
        super().eof_received()

    def failed(self, error, /, *, receiving, sending):
        self.deliver()
        super().failed(error, receiving=receiving, sending=sending)

    def closed(self):
        self.deliver()
        super().closed()


@pytest.fixture
def gathering():
    """Two streams of a pair, by the client's ids, whose far sinks gather."""
    pair = Pair()
    found = []
    for _ in range(2):
        ours, theirs = pair.open()
        sink = theirs.sink = Gatherer()
        sink.stream = theirs
        found.append((ours, sink))
    return pair, found


def test_it_is_delivered_once_all_is_taken_in(gathering):
    pair, [(one, first), (other, second)] = gathering
    seen = []
    first.on["data"] = lambda _stream: seen.append((bytes(first.data), len(second.views)))
    pair.client.inject(Data(one.id, b"a"), Data(other.id, b"b"), Data(one.id, b"c"), Ping(1))
    assert (first.data, second.data) == (b"ac", b"b")
    assert seen[0] == (b"a", 1), "delivered before the other had been given its own"
    pair.client.inject(Data(one.id, b"d"))
    assert first.data == b"acd" and second.data == b"b"


def test_what_came_before_an_offence_is_delivered(gathering):
    pair, [(one, first), (other, second)] = gathering
    pair.client.inject(Data(one.id, b"a"), Data(other.id, b"b"), b"\x3f\0\0\0\0\0\0\0")
    assert pair.server.error is not None
    assert (first.data, second.data) == (b"a", b"b")
    assert first.kinds == second.kinds == ["data", "failed", "closed"]


def test_what_came_before_the_end_of_the_session_is_delivered(gathering):
    pair, [(one, first), _] = gathering
    pair.client.inject(Data(one.id, b"a"), Close(Code.NO_ERROR))
    assert first.data == b"a"


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_the_end_may_come_in_the_same_read(gathering, end):
    pair, [(one, first), _] = gathering
    if end == "fin":
        pair.client.inject(Data(one.id, b"a"), Data(one.id, b"b", int(DataFlag.FIN)))
    else:
        pair.client.inject(Data(one.id, b"ab"), Reset(one.id, Code.CANCELLED, 2))
    assert first.data == b"ab"
    assert first.kinds[-1] == ("eof" if end == "fin" else "failed")
    assert not pair.server.mux.gathering


def test_a_sink_that_fails_leaves_nothing_behind(gathering):
    pair, [(one, first), (other, second)] = gathering
    first.fails = True
    with pytest.raises(RuntimeError):
        pair.client.inject(Data(one.id, b"a"), Data(other.id, b"b"))
    assert not pair.server.mux.gathering
    first.fails = False
    pair.server.mux.close()  # as a driver does then, whose buffer still holds what came
    assert second.data == b"b"
