"""The vectors of tests/vectors, run against the codec and the multiplexer."""

import contextlib
import json
from pathlib import Path

import pytest

from konnektor import frames
from konnektor.errors import Code, ProtocolError
from konnektor.frames import FrameType, HelloTLV, scan
from konnektor.limits import KIB, Limits
from konnektor.mux import Mux
from konnektor.replay import Ticket
from konnektor.settings import Settings
from tests.pair import Newcomer, Pair, Side

VECTORS = Path(__file__).parent.parent / "vectors"
BYTES = {"payload", "nonce", "mac", "session_id"}


def load(name):
    return [pytest.param(vector, id=vector["name"]) for vector in json.loads((VECTORS / f"{name}.json").read_text())]


def unpack(parts):
    return b"".join(bytes.fromhex(p) if isinstance(p, str) else bytes.fromhex(p[0]) * p[1] for p in parts)


def build(meaning):
    """A konnektor frame from a vector's meaning."""
    fields = {key: unpack(value) if key in BYTES else value for key, value in meaning.items() if key != "type"}
    if "tlvs" in fields:
        fields["tlvs"] = {tlv: unpack(value) for tlv, value in fields["tlvs"]}
    return getattr(frames, meaning["type"].capitalize())(**fields)


def cuts(size):
    """Where to cut: everywhere in short inputs, around the interesting places in long ones."""
    return range(size) if size <= 300 else sorted({*range(60), size // 2, *range(size - 5, size)})


@pytest.mark.parametrize("vector", load("frames"))
def test_decode(vector):
    data = unpack(vector["bytes"])
    [(frame, end)] = scan(data, vector.get("max_frame", 65_535))
    assert end == len(data)
    assert frame == (vector["frame"] and build(vector["frame"]))
    if frame is not None:
        assert type(frame).__name__.upper() == vector["frame"]["type"]


@pytest.mark.parametrize("vector", load("frames"))
def test_decode_cut_anywhere(vector):
    data = unpack(vector["bytes"])
    for cut in cuts(len(data)):
        assert list(scan(data[:cut])) == []


@pytest.mark.parametrize("vector", load("frames"))
def test_encode(vector):
    if vector.get("canonical", True):
        assert build(vector["frame"]).encode() == unpack(vector["bytes"])


@pytest.mark.parametrize("vector", load("errors"))
def test_errors(vector):
    with pytest.raises(ProtocolError) as caught:
        list(scan(unpack(vector["bytes"]), vector.get("max_frame", 65_535)))
    assert caught.value.code == Code[vector["error"]]


def test_every_type_and_flag_has_a_vector():
    known = [vector.values[0] for vector in load("frames")]
    seen = {vector["frame"]["type"] for vector in known if vector["frame"]}
    assert seen == {kind.name for kind in FrameType}
    assert {vector["frame"]["flags"] for vector in known if vector["frame"] and "flags" in vector["frame"]} == {0, 1, 2}
    tlvs = {
        tlv for v in known if v["frame"] and v["frame"]["type"] in ("OPEN", "ACCEPT") for tlv, _ in v["frame"]["tlvs"]
    }
    assert tlvs == set(frames.OpenTLV)
    sessions = [frame for v in load("sessions") for frame, _ in scan_what_can_be(unpack(v.values[0]["bytes"]))]
    hellos = [build(v["frame"]) for v in known if v["frame"]] + sessions
    settings = {tlv for frame in hellos if isinstance(frame, frames.Hello) for tlv in frame.tlvs}
    assert settings >= set(HelloTLV)


def scan_what_can_be(data):
    """The frames up to the first that is none."""
    with contextlib.suppress(ProtocolError):
        yield from scan(data)


def session(data, sizes):
    """A server that is fed ``data`` in pieces of ``sizes``: (its mux, what it sent)."""
    limits = Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=256 * KIB)
    pair = Pair.__new__(Pair)
    pair.now = 0.0
    side = Side(pair, "server", limits)
    side.auto = False
    assert isinstance(side.mux, Mux) and side.mux.settings == Settings.of(limits)
    rest, pos = b"", 0
    for size in sizes:
        rest += data[pos : pos + size]
        pos += size
        rest = rest[side.mux.receive(rest, 0.0) :]
    assert pos >= len(data)
    side.flush()
    return side.mux, [frame for frame, _ in scan(bytes(side.wire))]


@pytest.mark.parametrize("vector", load("resume"))
def test_resume(vector):
    pair = Pair(resumable=True)
    server, mux = pair.server, pair.server.mux
    state = vector["session"]
    ticket = mux.resumption.ticket = Ticket(unpack(state["id"]), unpack(state["key"]))
    ticket.attempt = state["attempt"]
    mux.inbound.acks.seq = state["taken"]
    for _ in range(state["sent"]):
        mux.flight.on_sent(8)
    mux.flight.on_ack(state["acked"], pair.now)
    pair.cut()
    newcomer = Newcomer(server, knows=ticket.session_id)
    assert newcomer.mux.nonce == unpack(vector["nonce"])
    data = unpack(vector["bytes"])
    rest = sent = b""
    for at in range(len(data)):  # byte by byte
        rest += data[at : at + 1]
        rest = rest[newcomer.mux.receive(rest, pair.now) :]
        sent += newcomer.mux.data_to_send(pair.now)
    ((hello, end), *said) = scan(sent)
    assert isinstance(hello, frames.Hello)
    assert not {HelloTLV.SESSION_ID, HelloTLV.RESUME_KEY} & set(hello.tlvs)
    if vector["answer"] is None:
        assert newcomer.error.code == Code.RESUME_REFUSED
        assert [(type(frame), frame.code) for frame, _ in said] == [(frames.Close, Code.RESUME_REFUSED)]
        assert server.gone and ticket.attempt == state["attempt"], "left alone"
        return
    assert not said and len(sent) == end
    assert mux.data_to_send(pair.now).startswith(unpack(vector["answer"]))
    (hello, _), (frame, _) = scan(data)
    nonces = hello.nonce + newcomer.mux.nonce
    assert ticket.attempt == frame.attempt
    assert frame.mac == ticket.client_mac(frame.attempt, frame.rx_seq, nonces)
    assert mux.flight.acked == frame.rx_seq


@pytest.mark.parametrize("vector", load("sessions"))
def test_sessions(vector):
    data = unpack(vector["bytes"])
    splits = [[len(data)], [1] * min(len(data), 400) + [len(data)], *([cut, len(data)] for cut in cuts(len(data)))]
    for sizes in splits:
        mux, sent = session(data, sizes)
        if vector["error"] is None:
            assert mux.error is None
            assert not any(isinstance(frame, frames.Close) for frame in sent)
        else:
            assert mux.error is not None
            assert mux.error.code == sent[-1].code == Code[vector["error"]]
            assert isinstance(sent[-1], frames.Close)
        for reply in vector.get("replies", ()):
            fields = {key: value for key, value in reply.items() if key != "type"}
            kind = getattr(frames, reply["type"].capitalize())
            assert any(
                isinstance(frame, kind) and all(getattr(frame, key) == value for key, value in fields.items())
                for frame in sent
            )
