"""The tables, every state by every event: what stands there, and that all else is refused."""

import pytest

from konnektor.errors import LocalProtocolError, StreamStateError
from konnektor.mux_stream import MuxStream
from konnektor.states import RECEIVE, SEND, Event, Receiving, Sending
from tests.pair import Pair, Recorder

CALLS = {event for event in Event if event.name.startswith("DO_")}


def stream_in(receiving, sending):
    return MuxStream(Pair().client.mux, Recorder(), "x", 1, {}, receiving, sending, 0.0)


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", Receiving)
def test_receiving(state, event):
    stream = stream_in(state, Sending.OPEN)
    if (state, event) in RECEIVE:
        stream.move_receiving(event)
        assert stream.receiving is RECEIVE[state, event]
    else:
        with pytest.raises(LocalProtocolError if event in CALLS else StreamStateError, match=state.name):
            stream.move_receiving(event)
        assert stream.receiving is state
    assert stream.sending is Sending.OPEN


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", Sending)
def test_sending(state, event):
    stream = stream_in(Receiving.OPEN, state)
    if (state, event) in SEND:
        stream.move_sending(event)
        assert stream.sending is SEND[state, event]
    else:
        with pytest.raises(LocalProtocolError if event in CALLS else StreamStateError, match=state.name):
            stream.move_sending(event)
        assert stream.sending is state
    assert stream.receiving is Receiving.OPEN


def reachable(table, start):
    seen, todo = set(), [start]
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            todo += [after for (before, _), after in table.items() if before is state]
    return seen


@pytest.mark.parametrize(
    ("table", "starts", "end"),
    [
        (RECEIVE, [Receiving.OPEN, Receiving.AWAITING], Receiving.ENDED),
        (SEND, [Sending.UNSENT, Sending.UNDECIDED], Sending.ENDED),
    ],
)
def test_every_state_is_reachable_and_can_end(table, starts, end):
    states = set(type(end))
    assert set().union(*(reachable(table, start) for start in starts)) == states
    assert all(end in reachable(table, state) for state in states)
    assert all(after is end for (before, _), after in table.items() if before is end)
