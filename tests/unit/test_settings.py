"""HELLO's settings, there and back."""

import pytest

from konnektor.errors import ConfigurationError, ProtocolError
from konnektor.frames import HelloTLV
from konnektor.limits import Limits
from konnektor.settings import FLOORS, Settings


def test_there_and_back():
    settings = Settings.of(
        Limits(idle_timeout=42.5),
        software="konnektor/1",
        instance=b"i" * 16,
        name="node-1",
        routes=("host=node-1", "cidr=10.0.0.0/8"),
        labels={"zone": "a", "empty": ""},
    )
    assert Settings.from_tlvs(settings.to_tlvs()) == settings


def test_defaults_are_the_floors():
    assert Settings.from_tlvs({}) == FLOORS
    assert Settings.from_tlvs({0x1A1A: b"grease", HelloTLV.ROUTES: b"\n\n"}) == FLOORS


def test_a_larger_frame_than_there_can_be_is_cut():
    assert Settings.from_tlvs({HelloTLV.MAX_FRAME: b"\xff" * 4}).max_frame == 65_535


@pytest.mark.parametrize(
    ("tlv", "value"),
    [
        (HelloTLV.MAX_FRAME, (16_375).to_bytes(4, "big")),
        (HelloTLV.INITIAL_WINDOW, (16_383).to_bytes(4, "big")),
        (HelloTLV.INITIAL_STREAMS, (7).to_bytes(4, "big")),
        (HelloTLV.IDLE_TIMEOUT, (29_999).to_bytes(4, "big")),
        (HelloTLV.FEATURES, b""),
        (HelloTLV.INSTANCE, b"i" * 15),
        (HelloTLV.INSTANCE, b""),
    ],
)
def test_bad_values(tlv, value):
    with pytest.raises(ProtocolError, match=tlv.name):
        Settings.from_tlvs({tlv: value})


def test_texts_are_cleaned():
    settings = Settings.from_tlvs({HelloTLV.NAME: b"a\x1b[0m", HelloTLV.ROUTES: b"host=\x07a\ndefault"})
    assert settings.name == "a?[0m"
    assert settings.routes == ("host=?a", "default")


@pytest.mark.parametrize("bad", [{"name": "a\nb"}, {"labels": {"a=b": "c"}}, {"routes": ("r" * 1000,) * 4}])
def test_what_cannot_be_declared(bad):
    with pytest.raises(ConfigurationError):
        Settings.of(Limits(), **bad)


def test_the_largest_declaration_fits_a_hello():
    from tests.pair import SMALL, Pair

    pair = Pair(hello=False)
    pair.client.mux.settings = Settings.of(SMALL, routes=("é" * 1790,), instance=b"i" * 16)
    pair.pump()
    assert pair.server.mux.established
