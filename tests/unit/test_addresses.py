"""Hosts, networks, ports and names as text: one meaning each, or refused."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.addresses import (
    Forward,
    canonical_host,
    format_hostport,
    parse_forward,
    parse_host,
    parse_hostport,
    parse_network,
    parse_port,
    parse_worker_name,
    quote,
    unwrap,
    unwrap_network,
)
from konnektor.errors import ConfigurationError

ODD_HOSTS = [
    "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "010.0.0.1", "127.0.0.1.", "127.0.0.0x1", "1.2.3.4.5",
    "256.0.0.1", "fe80::1%eth0", "fe80::1%", "::ffff:127.1", "[::1]", "", ".", "..", "a..b", ".a", "-a", "a-", "a b",
    "a\n", "a\x00", "a/b", "a@b", "a:b", "m\xfcnchen.example", "\uff11\uff12\uff17.0.0.1", "a" * 64,
    ".".join(["a" * 63] * 4), "x.0x", "*", "*.a",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_HOSTS)
def test_odd_hosts_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_host(text)


@pytest.mark.parametrize(
    ("text", "host", "canonical"),
    [
        ("DB.Example", "db.example", "db.example"),
        ("db.example.", "db.example", "db.example."),
        ("my_db", "my_db", "my_db"),
        ("a" * 63, "a" * 63, "a" * 63),
        ("1.2.3.4.example", "1.2.3.4.example", "1.2.3.4.example"),
        ("10.0.0.7", ip_address("10.0.0.7"), "10.0.0.7"),
        ("0:0::1", ip_address("::1"), "::1"),
        ("::FFFF:10.0.0.7", ip_address("::ffff:10.0.0.7"), "::ffff:a00:7"),
    ],
)
def test_hosts(text: str, host: object, canonical: str) -> None:
    assert parse_host(text) == host
    assert parse_host(canonical_host(text)) == host
    if ".0.0.7" not in text or text == "10.0.0.7":  # how a mapped address is printed differs among Python versions
        assert canonical_host(text) == canonical


@given(st.text(max_size=30))
def test_any_text_is_a_host_or_a_configuration_error(text: str) -> None:
    try:
        canonical = canonical_host(text)
    except ConfigurationError as error:
        said = str(error)
    else:
        said = ""
        assert canonical_host(canonical) == canonical
    assert said.isascii()
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.7", "10.0.0.7/32"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::1", "::1/128"),
        ("fd00::/8", "fd00::/8"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:10.0.0.7", "10.0.0.7/32"),
    ],
)
def test_networks(text: str, network: str) -> None:
    assert parse_network(text) == ip_network(network)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.7/8", "write 10.0.0.0/8"),
        ("10.0.0.0/33", "0 to 32"),
        ("10.0.0.0/", "0 to 32"),
        ("10.0.0.0/255.0.0.0", "0 to 32"),
        ("10.0.0.0/-1", "0 to 32"),
        ("10.0.0.0/٣", "0 to 32"),
        ("::/0129", "0 to 128"),
        ("db.example/8", "CIDR"),
        ("10.1/16", "neither"),
        ("fe80::1%eth0/64", "scope id"),
    ],
)
def test_bad_networks(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_network(text)


def test_a_name_is_no_network() -> None:
    assert parse_network("DB.example") == "db.example"


def test_unwrap() -> None:
    assert unwrap(ip_address("::ffff:127.0.0.1")) == ip_address("127.0.0.1")
    assert unwrap(ip_address("::1")) == ip_address("::1")
    assert unwrap(ip_address("10.0.0.7")) == ip_address("10.0.0.7")
    assert unwrap_network(ip_network("::/0")) == ip_network("::/0")
    assert unwrap_network(ip_network("10.0.0.0/8")) == ip_network("10.0.0.0/8")


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("127.0.0.1:8443", ("127.0.0.1", 8443)),
        ("[::1]:1", ("::1", 1)),
        ("[0:0::1]:65535", ("::1", 65535)),
        ("DB.example.:80", ("db.example.", 80)),
    ],
)
def test_hostport(text: str, pair: tuple[str, int]) -> None:
    assert parse_hostport(text) == pair
    assert parse_hostport(format_hostport(*pair)) == pair


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("127.0.0.1", "lacks a host or a port"),
        (":80", "lacks a host or a port"),
        ("[]:80", "lacks a host or a port"),
        ("[::1]", "lacks a host or a port"),
        ("", "lacks a host or a port"),
        ("::1:80", "in brackets"),
        ("https://db:80", "'https://db:80' is a URL: write HOST:PORT, without https://$"),
        ("http://db", "is a URL: write HOST:PORT, without http://$"),
        ("http+unix:///run/s", "without http\\+unix://$"),
        ("[db]:80", "IPv6 only"),
        ("[10.0.0.1]:80", "IPv6 only"),
        ("[a]:b]:80", "IPv6 only"),
        ("db:", "1 to 65535"),
        ("db:0", "1 to 65535"),
        ("db:65536", "1 to 65535"),
        ("db:+80", "1 to 65535"),
        ("db: 80", "1 to 65535"),
        ("db:٨٠", "1 to 65535"),
        ("db:000080", "1 to 65535"),
        ("127.1:80", "neither"),
    ],
)
def test_bad_hostport(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_hostport(text)


def test_port_zero() -> None:
    assert parse_hostport("127.0.0.1:0", zero=True) == ("127.0.0.1", 0)
    with pytest.raises(ConfigurationError, match="0 to 65535"):
        parse_port("x", zero=True)


@pytest.mark.parametrize("name", ["a", "node-1", "node-1.example", "10.0.0.7", "a" * 63])
def test_worker_names(name: str) -> None:
    assert parse_worker_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", ".a", "A", "a_b", "a/b", "a" * 64, "a\n", "ä"])
def test_bad_worker_names(name: str) -> None:
    with pytest.raises(ConfigurationError, match="not usable"):
        parse_worker_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:8080=node-1/10.0.0.7:80",
        "[::1]:0=node-1.example/[fd00::1]:65535",
        "udp:127.0.0.1:5353=node-1/db:53",
        "udp:[::1]:0=node-1/[fd00::1]:53",
        "udp:udp:53=udp/udp:53",
        "udp:53=udp/udp:53",  # a host named so
    ],
)
def test_forward(text: str) -> None:
    assert str(parse_forward(text)) == text


def test_forward_fields() -> None:
    expected = Forward("127.0.0.1", 0, "n", "db.example", 5432)
    assert parse_forward("127.0.0.1:0=n/db.example:5432") == expected
    assert parse_forward("tcp:127.0.0.1:0=n/db.example:5432") == expected
    assert parse_forward("udp:127.0.0.1:0=n/db.example:5432") == expected._replace(protocol="udp")
    assert parse_forward("udp:53=n/db:53") == Forward("udp", 53, "n", "db", 53, "tcp")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("127.0.0.1:80", "incomplete"),
        ("127.0.0.1:80=n", "incomplete"),
        ("127.0.0.1=n/db:80", "^LISTEN of forward '127.0.0.1=n/db:80': address '127.0.0.1' lacks a host or a port"),
        ("18600=n/db:80", "^LISTEN of forward '18600=n/db:80': address '18600' lacks a host or a port"),
        ("127.0.0.1:80=n/db", "^address 'db' lacks a host or a port"),
        ("127.0.0.1:80=N/db:80", "not usable"),
        ("127.0.0.1:80=n/db:0", "1 to 65535"),
        ("udp:127.0.0.1=n/db:80", "too many colons|not a number"),
        ("sctp:127.0.0.1:80=n/db:80", "too many colons"),
    ],
)
def test_bad_forward(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_forward(text)


def test_quote_is_bounded_and_printable() -> None:
    assert quote("a\nä") == r"'a\n\xe4'"
    assert len(quote("x" * 1000)) < 100
