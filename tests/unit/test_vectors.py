"""The vectors of tests/vectors, run against the codec and the multiplexer."""

import json
from pathlib import Path

import pytest

from konnektor import frames
from konnektor.errors import Code, ProtocolError
from konnektor.frames import FrameType, scan
from konnektor.limits import KIB, Limits
from konnektor.mux import Mux
from konnektor.settings import Settings
from tests.pair import Pair, Side

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
