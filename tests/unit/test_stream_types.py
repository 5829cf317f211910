"""Stream types travel as MessagePack maps, are checked on arrival, and can grow."""

import contextlib
from typing import Annotated, ClassVar, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.errors import ConfigurationError
from konnektor.stream_types import StreamType, Tcp, Udp, check_request, check_type
from tests.pair import Pair


class Exec(StreamType):
    name = "exec@acme.example"
    argv: list[str]
    tty: bool = False


class Either(StreamType):
    name = "either@acme.example"
    which: Literal["a", "b"]
    options: dict[str, int] | None = None


def test_round_trip():
    assert Exec.decode(Exec(["a", "b"], tty=True).encode()) == Exec(["a", "b"], tty=True)
    assert Tcp.decode(Tcp("db", 5432).encode()) == Tcp("db", 5432)
    assert Udp.decode(Udp("db", 53).encode()) == Udp("db", 53)


def test_what_was_sent_before_excuses_nothing():
    assert Tcp("db", 1).encode() == Tcp("db", 1).encode() == Udp("db", 1).encode()
    for request in (Tcp("db", True), Udp("db", 1.0)):  # equal to 1
        with pytest.raises(ConfigurationError, match=r"port takes `int`"):
            request.encode()


def test_a_header_that_came_before_is_still_of_its_own_type():
    header = Tcp("db", 1).encode()
    assert Tcp.decode(header) is Tcp.decode(bytes(bytearray(header))), "decoded once"
    assert type(Udp.decode(header)) is Udp

    class Loud(Tcp):
        name = "loud@acme.example"

    assert type(Loud.decode(header)) is Loud
    for _ in range(2):
        with pytest.raises(ValueError, match="malformed tcp header"):
            Tcp.decode(header[:-1])


def test_of_headers_longer_than_a_host_can_be_none_is_kept():
    header = msgspec.msgpack.encode({"host": "db", "port": 1, "unheard": "x" * 300})
    assert Tcp.decode(header) == Tcp("db", 1)
    assert Tcp.decode(header) is not Tcp.decode(header)


def test_a_subclass_of_a_destination_keeps_its_fields():
    class Labelled(Tcp):
        name = "labelled@acme.example"
        label: str = ""

    assert Labelled.decode(Labelled("db", 1, "x").encode()) == Labelled("db", 1, "x")
    assert Labelled.decode(Labelled("db", 1).encode()) == Labelled("db", 1)
    with pytest.raises(ConfigurationError, match="neither an IP address nor a DNS name"):
        Labelled("127.1", 1).encode()


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


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Tcp("a", 99999), r"Tcp\.port takes `int` <= 65535"),
        (Tcp("a", 0), r"Tcp\.port takes `int` >= 1"),
        (Tcp("a", "80"), r"Tcp\.port takes `int`, not `str`"),
        (Tcp("", 80), r"Tcp\.host takes `str` of length >= 1"),
        (Udp(None, 80), r"Udp\.host takes `str`, not `None`"),
        (Udp("127.1", 80), "host '127.1' is neither an IP address nor a DNS name"),
        (Tcp("[::1]", 80), "neither an IP address nor a DNS name"),
        (Tcp("fe80::1%eth0", 80), "scope id"),
        (Exec("ls"), r"Exec\.argv takes `array`, not `str`"),
        (Exec(["ls", 1]), r"Exec\.argv\[1\] takes `str`, not `int`"),
        (Exec([object()]), "Exec cannot be sent: .*object"),
        (Exec(["\ud800"]), "Exec cannot be sent: .*surrogates"),
        (Exec([2**70]), "Exec cannot be sent: .*2"),
        (Either("c"), "Either cannot be sent: Invalid enum value 'c' - at `\\$.which`"),
        (Either("a", {1: 2}), "Either.options takes `str`, not `int`"),
    ],
)
def test_what_its_own_type_does_not_take_is_not_sent(request_, says):
    with pytest.raises(ConfigurationError, match=says):
        request_.encode()


@given(st.binary(max_size=200))
def test_garbage_is_malformed_or_a_request(header):
    with contextlib.suppress(ValueError):
        assert isinstance(Tcp.decode(header), Tcp)


@pytest.mark.parametrize("name", ["Exec@acme.example", "exec acme", "exec@", "@acme", "x" * 300, "exec@ACME", 5, None])
def test_names_that_cannot_travel(name):
    with pytest.raises(ConfigurationError, match="write NAME@DOMAIN"):
        type("Bad", (StreamType,), {"name": name})


def test_a_base_of_other_types_needs_no_name():
    class Base(StreamType, kw_only=True):
        priority = 2
        user: str = ""

    class Leaf(Base):
        name = "leaf@acme.example"

    assert Leaf.decode(Leaf(user="a").encode()) == Leaf(user="a")
    assert Leaf.priority == 2
    check_type(Leaf)
    for check in (Base.check, lambda: check_type(Base), lambda: check_request(Base())):
        with pytest.raises(ConfigurationError, match="write NAME@DOMAIN"):
            check()


def test_what_describes_a_type_is_no_field():
    for attribute, kind, value in (
        ("name", str, "x@acme.example"),
        ("name", "str", "x@acme.example"),
        ("name", Annotated[str, msgspec.Meta(min_length=1)], "x@acme.example"),
        ("priority", int, 2),
        ("datagrams", bool, True),
    ):
        with pytest.raises(ConfigurationError, match=rf"Bad\.{attribute} has an annotation.*: write {attribute} = "):
            type("Bad", (StreamType,), {"__annotations__": {attribute: kind}, attribute: value})
        with pytest.raises(ConfigurationError, match="has an annotation"):
            type("Bad", (StreamType,), {"__annotations__": {attribute: kind}})


def test_a_class_variable_is_no_field():
    class Plain(StreamType):
        name: ClassVar[str] = "x@acme.example"

    class Quoted(StreamType):
        name: "ClassVar[str]" = "x@acme.example"

    for good in (Plain, Quoted):
        check_request(good())


@pytest.mark.parametrize("priority", [3, -1, "bulk", None])
def test_priorities_of_a_type_that_are_none(priority):
    with pytest.raises(ConfigurationError, match=r"Bad\.priority is .*; write 0 for"):
        type("Bad", (StreamType,), {"name": "x@acme.example", "priority": priority})


@pytest.mark.parametrize(
    ("given", "says"),
    [(Exec(["a"]), "not an instance of Exec"), (str, "not the class str"), ("tcp", "not an instance of str")],
)
def test_what_is_no_stream_type(given, says):
    with pytest.raises(ConfigurationError, match=f"a stream type is .* {says}"):
        check_type(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [(Exec, r"not the class Exec: write Exec\("), ("tcp", r"not an instance of str: write Tcp\(")],
)
def test_what_is_no_request(given, says):
    with pytest.raises(ConfigurationError, match=f"a request is .* {says}"):
        check_request(given)


@pytest.mark.parametrize("name", ["tcp", "0", "a-b.c_d", "exec@acme.example", "x" * 63, "x" * 63 + "@" + "a" * 191])
def test_names_that_can(name):
    good = type("Good", (StreamType,), {"name": name})
    good.check()
    mux_stream, _ = Pair().open(name=good.name)
    assert mux_stream.id == 1, "its OPEN went out"
