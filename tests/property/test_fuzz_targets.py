"""The fuzz targets, without atheris: their seeds, random bytes, and what fuzzing once found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz import decoder, sessions
from fuzz.liar import Liar
from fuzz.sessions import TALK, op
from konnektor import frames


@pytest.mark.parametrize("target", [decoder, sessions])
def test_every_seed(target):
    count = 0
    for seed in target.seeds():
        target.one(seed)
        count += 1
    assert count > 300


@pytest.mark.parametrize("target", [decoder, sessions])
def test_random_programs(target):
    @given(st.binary(max_size=400))
    def run(data):
        target.one(data)

    run()


def test_the_decoder_target_notices_a_meaning_that_depends_on_pieces(monkeypatch):
    def forgetful(buffer, max_frame):
        for frame, end in frames.scan(buffer, max_frame):
            if len(buffer) < 30:
                yield frame, end

    monkeypatch.setattr(decoder, "scan", forgetful)
    with pytest.raises(AssertionError, match="other pieces"):
        decoder.one(b"\0\4" + frames.Ping(1).encode() * 10)


def test_the_sessions_target_notices_what_is_lost():
    stage = sessions.Liar(sessions.Program(b""))
    ours, theirs = stage.pair.open(auto=False)
    stage.write_to(ours, b"some bytes")
    stage.exchange()
    sessions.check(stage)
    theirs.sink.data[2:3] = b"X"
    with pytest.raises(AssertionError, match="other bytes"):
        sessions.check(stage)
    theirs.sink.data[2:] = b""
    sessions.check(stage)
    with pytest.raises(AssertionError, match="not all"):
        sessions.finish_honest(stage)


DATAGRAM = op(Liar.lie, 0, 1, 0, 15, 0, 255, 0)  # of 65,408 bytes, to the client
FOUND = {
    "a server that talked on after it had refused to resume: the client's driver kept all of it": (
        bytes(3)
        + TALK
        + op(Liar.cut, 0, 0, 0)
        + op(Liar.reconnect, 0, 0, 0)
        + op(Liar.lie, 0, 0, 0, 16, 3, 0)
        + DATAGRAM * 2
    ),
    "a half that was stopped, and had ended, was taken for owed as long as the other half went on": (
        b"\4\0\1" + TALK + op(Liar.break_off, 0, 0, 1, 0) + op(Liar.exchange) + op(Liar.sleep, 3, 1) * 25
    ),
}


@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND)
def test_what_fuzzing_sessions_found(program):
    sessions.one(program)
