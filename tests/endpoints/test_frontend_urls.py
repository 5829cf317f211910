"""Where frontends listen, from their URLs."""

import pytest

from konnektor.errors import ConfigurationError
from konnektor.frontends.urls import HttpFrontend, HttpsFrontend, UnixFrontend, parse_frontend


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8080", HttpFrontend("127.0.0.1", 8080)),
        ("http://[::1]:0/", HttpFrontend("::1", 0)),
        ("http://localhost:1", HttpFrontend("localhost", 1)),
        ("http+unix:///run/k.sock", UnixFrontend("/run/k.sock")),
        ("http+unix:///run/%E2%98%83", UnixFrontend("/run/\N{SNOWMAN}")),
        ("http+unix:///run/a%20b.sock", UnixFrontend("/run/a b.sock")),
        (
            "https://0.0.0.0:8444?cert=a+b.pem&key=k%26.pem&client-ca=/ca",
            HttpsFrontend("0.0.0.0", 8444, "a+b.pem", "k&.pem", "/ca"),
        ),
    ],
)
def test_good(url, expected):
    assert parse_frontend(url) == expected


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("127.0.0.1:8080", "is unknown: write http://"),
        ("ftp://127.0.0.1:1", "is unknown"),
        ("http://127.0.0.1:1/path", "is unknown"),
        ("http://127.0.0.1:1#x", "is unknown"),
        ("http://[::1", "is unknown"),
        ("http://127.0.0.1", "lacks a host or a port"),
        ("http://u@127.0.0.1:1", "neither an IP address nor a DNS name"),
        ("http://127.0.0.1:1?cert=x", "http takes no parameters"),
        ("http://0.0.0.0:1", "would serve anyone in plaintext"),
        ("http://node.example:1", "would serve anyone in plaintext"),
        ("http+unix://host/x", "has no usable path"),
        ("http+unix:x", "has no usable path"),
        ("http+unix:///x?mode=1", "has no usable path"),
        ("http+unix:///" + "x" * 107, "has no usable path"),
        ("http+unix:///x%00", "has no usable path"),
        ("http+unix:///a%0Ab", "without control characters"),
        ("http+unix:///" + "\N{SNOWMAN}" * 40, "at most 107 bytes of UTF-8"),
        ("http+unix:///\udcff", "has no usable path"),  # what Python makes of an argument that is not UTF-8
        ("http+unix:///%ff", "has no usable path"),
        ("https://h:1", "lacks cert, key, client-ca"),
        ("https://h:1?cert=a&key=b&client-ca=", "lacks client-ca"),
        ("https://h:1?cert=a&key=b&client-ca=c&ca=d", "has an unknown parameter 'ca'"),
        ("https://h:1?cert=a&key=b&client-ca=c&cert=d", "has a parameter twice"),
    ],
)
def test_bad(url, sentence):
    with pytest.raises(ConfigurationError) as caught:
        parse_frontend(url)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_in_words():
    assert str(HttpFrontend("::1", 1)) == "http://[::1]:1"
    assert str(UnixFrontend("/x")) == "http+unix:///x"
    assert str(HttpsFrontend("h", 1, "a", "b", "c")) == "https://h:1"
