"""Stream types travel as MessagePack maps, are checked on arrival, and can grow."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.errors import ConfigurationError
from konnektor.stream_types import StreamType, Tcp, Udp
from tests.pair import Pair


class Exec(StreamType):
    name = "exec@acme.example"
    argv: list[str]
    tty: bool = False


def test_round_trip():
    assert Exec.decode(Exec(["a", "b"], tty=True).encode()) == Exec(["a", "b"], tty=True)
    assert Tcp.decode(Tcp("db", 5432).encode()) == Tcp("db", 5432)
    assert Udp.decode(Udp("db", 53).encode()) == Udp("db", 53)


def test_who_carries_datagrams():
    assert (Tcp.datagrams, Udp.datagrams, Exec.datagrams) == (False, True, False)


def test_a_type_can_grow():
    assert Exec.decode(msgspec.msgpack.encode({"argv": ["a"], "unheard": 1})) == Exec(["a"])
    assert "tty" not in msgspec.msgpack.decode(Exec(["a"]).encode()), "defaults do not travel"


@pytest.mark.parametrize(
    "header",
    [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"host": "a", "port": 0}), b"\x91" * 5000,
     msgspec.msgpack.encode({"host": "", "port": 1}), msgspec.msgpack.encode({"host": "a", "port": "1"}),
     msgspec.msgpack.encode({"host": "x" * 256, "port": 1}), b"\x81\xa4host\xa1\xff"],
)  # fmt: skip
def test_malformed_headers(header):
    with pytest.raises(ValueError, match="malformed tcp header"):
        Tcp.decode(header)


@given(st.binary(max_size=200))
def test_garbage_is_malformed_or_a_request(header):
    with contextlib.suppress(ValueError):
        assert isinstance(Tcp.decode(header), Tcp)


@pytest.mark.parametrize("name", ["", "Exec@acme.example", "exec acme", "exec@", "@acme", "x" * 300, "exec@ACME"])
def test_names_that_cannot_travel(name):
    bad = type("Bad", (StreamType,), {"name": name})
    with pytest.raises(ConfigurationError, match="write NAME@DOMAIN"):
        bad.check()


@pytest.mark.parametrize("name", ["tcp", "0", "a-b.c_d", "exec@acme.example", "x" * 63, "x" * 63 + "@" + "a" * 191])
def test_names_that_can(name):
    good = type("Good", (StreamType,), {"name": name})
    good.check()
    mux_stream, _ = Pair().open(name=good.name)
    assert mux_stream.id == 1, "its OPEN went out"
