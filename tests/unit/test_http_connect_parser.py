"""The CONNECT front door, byte by byte: what kube-apiserver and curl send, and what must not pass."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from konnektor import errors
from konnektor.frontends.http_connect import (
    MAX_HEAD,
    BadRequest,
    ConnectParser,
    ConnectRequest,
    response,
    status_for,
)

KUBE_APISERVER = b"CONNECT 10.0.0.7:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
CURL = (
    b"CONNECT DB.example:443 HTTP/1.1\r\nHost: DB.example:443\r\nUser-Agent: curl/8.5.0\r\n"
    b"Proxy-Connection: Keep-Alive\r\nKonnektor-Worker: node-1\r\n\r\n"
)

GOOD = {
    KUBE_APISERVER: ConnectRequest("10.0.0.7", 10250, None, b""),
    CURL: ConnectRequest("db.example", 443, "node-1", b""),
    b"CONNECT [0:0::1]:80 HTTP/1.1\r\nHost:\r\n\r\n\x16\x03\r\n\r\n\x00": ConnectRequest(
        "::1", 80, None, b"\x16\x03\r\n\r\n\x00"
    ),
    b"CONNECT a.:1 HTTP/1.0\r\nX: \tcaf\xc3\xa9\t\r\n\r\n\n": ConnectRequest("a.", 1, None, b"\n"),
}


def head(target: bytes = b"a:1", *headers: bytes, method: bytes = b"CONNECT", version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join([method + b" " + target + b" " + version, b"Host: a", *headers, b"", b""])


BAD = {
    head(method=b"GET"): 405,
    head(b"/", method=b"POST"): 405,
    head(method=b"connect"): 405,
    head(version=b"HTTP/1.2"): 505,
    head(version=b"HTTP/2.0"): 505,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": 505,
    head(version=b"HTTP/11"): 400,
    head(version=b"http/1.1"): 400,
    b"CONNECT a:1 HTTP/1.1\r\n\r\n": 400,  # no Host
    head(b"a:1", b"Host: b"): 400,
    head(b"a:1", b"Content-Length: 0"): 400,
    head(b"a:1", b"Content-Length: 5"): 400,
    head(b"a:1", b"Transfer-Encoding: chunked"): 400,
    head(b"a:1", b"Transfer-Encoding: gzip"): 400,
    head(b"a:1", b"Konnektor-Worker: a", b"konnektor-worker: a"): 400,
    head(b"a:1", b"Konnektor-Worker:"): 400,
    head(b"a:1", b"Konnektor-Worker: N\xc3\xb6"): 400,
    head(b"a:1", b"Konnektor-Worker: a, b"): 400,
    head(b"a:1", b" folded"): 400,
    head(b"a:1", b"\tfolded"): 400,
    head(b"a:1", b"X : y"): 400,
    head(b"a:1", b"X"): 400,
    head(b"a:1", b": y"): 400,
    head(b"a:1", b"X: a\x00b"): 400,
    head(b"a:1", b"X: a\x01b"): 400,
    head(b"a:1", b"X: a\x7fb"): 400,
    head(b"a:1", b"X: a\rb"): 400,
    head(b"a:1", b"X: a\nY: b"): 400,
    head(b"a:1", b"X: a\r\r"): 400,
    b"CONNECT a:1 HTTP/1.1\nHost: a\n\n": 400,
    b"CONNECT  a:1 HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"CONNECT a:1\r\n\r\n": 400,
    b"\r\n\r\n": 400,
    b"\r\nCONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b" CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"\x16\x03\x01\x02\x00\x01": 400,  # TLS hello
    head(b"a"): 400,
    head(b"a:0"): 400,
    head(b"a:65536"): 400,
    head(b":80"): 400,
    head(b"::1:80"): 400,
    head(b"[::1]"): 400,
    head(b"[fe80::1%25eth0]:80"): 400,
    head(b"127.1:80"): 400,
    head(b"2130706433:80"): 400,
    head(b"user@a:80"): 400,
    head(b"http://a:80/"): 400,
    head(b"a:80/"): 400,
    head(b"a" * 300 + b":80"): 400,
    head(b"a:1", b"X: " + b"x" * MAX_HEAD): 431,
    b"C" * MAX_HEAD: 431,
    b"C" * MAX_HEAD + b"\x00": 431,
    b"C" * (MAX_HEAD - 1) + b"\x00": 400,
}


def brief(data: bytes) -> str:
    return ascii(data[:64])


def outcome(pieces: list[bytes]) -> ConnectRequest | int | None:
    """What the parser makes of the pieces; what follows the request joins its rest."""
    parser = ConnectParser()
    for index, piece in enumerate(pieces):
        try:
            request = parser.feed(piece)
        except BadRequest as error:
            return error.status
        if request is not None:
            rest = b"".join([request.rest, *pieces[index + 1 :]])
            return ConnectRequest(request.host, request.port, request.worker, rest)
    return None


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("data", GOOD, ids=brief)
def test_good_requests(data: bytes) -> None:
    assert outcome([data]) == GOOD[data]
    assert outcome([bytes([b]) for b in data]) == GOOD[data]


@pytest.mark.parametrize("data", BAD, ids=brief)
def test_bad_requests(data: bytes) -> None:
    assert outcome([data]) == BAD[data]
    assert outcome([bytes([b]) for b in data]) == BAD[data]


@given(st.sampled_from([*GOOD, *BAD]), st.lists(st.integers(min_value=0)))
def test_any_split_has_the_same_outcome(data: bytes, cuts: list[int]) -> None:
    assert outcome(split(data, cuts)) == outcome([data])


@given(st.binary(), st.binary(), st.lists(st.integers(min_value=0)))
@example(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nX:", b"\r\n\r\n", [])
def test_garbage_raises_nothing_but_bad_request(garbage: bytes, tail: bytes, cuts: list[int]) -> None:
    for data in (
        garbage,
        KUBE_APISERVER[:-2] + garbage + b"\r\n\r\n" + tail,
        b"CONNECT " + garbage + KUBE_APISERVER[22:],
    ):
        assert outcome(split(data, cuts)) == outcome([data])


@given(st.text(alphabet="CONET GET a.:1[]/ \r\n\tHTP/10:", max_size=60))
def test_near_misses_raise_nothing_but_bad_request(text: str) -> None:
    data = text.encode()
    result = outcome([data])
    assert outcome([bytes([b]) for b in data]) == result
    if isinstance(result, ConnectRequest):
        assert data.startswith(b"CONNECT ") and result.host and 0 < result.port < 65_536
    else:
        assert result in (None, 400, 405, 505)


@pytest.mark.parametrize("size", [MAX_HEAD - 1, MAX_HEAD, MAX_HEAD + 1])
def test_the_limit_is_exact(size: int) -> None:
    filler = b"X: " + b"x" * (size - len(head(b"a:1", b"X: ")))
    data = head(b"a:1", filler)
    assert len(data) == size
    assert outcome([data]) == (ConnectRequest("a", 1, None, b"") if size <= MAX_HEAD else 431)


def test_an_endless_head_is_not_kept() -> None:
    parser = ConnectParser(max_head=100)
    assert parser.feed(b"C" * 99) is None
    for _ in range(2):
        with pytest.raises(BadRequest, match="431 Request Head Too Large"):
            parser.feed(b"C")


def test_bytes_after_the_request_are_not_the_parsers() -> None:
    parser = ConnectParser()
    assert parser.feed(memoryview(KUBE_APISERVER)) is not None
    with pytest.raises(errors.LocalProtocolError):
        parser.feed(b"x")


def test_success_is_exact() -> None:
    assert response(200) == b"HTTP/1.1 200 Connection Established\r\n\r\n"


def test_error_responses() -> None:
    assert response(502, "Target Unreachable") == (
        b"HTTP/1.1 502 Target Unreachable\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 23\r\n\r\n"
        b"502 Target Unreachable\n"
    )
    assert response(405).startswith(b"HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\n")
    for phrase in ("a\r\nb", " a", "a ", "ä", "a\x00"):
        with pytest.raises(ValueError, match="plain text"):
            response(500, phrase)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadRequest(431, "x"), 431),
        (errors.DeniedError("secret"), 403),
        (errors.UnsupportedError(), 501),
        (errors.ConnectRefusedError(), 502),
        (errors.UnreachableError(), 502),
        (errors.DNSError(), 502),
        (errors.TargetResetError(), 502),
        (errors.TargetTLSError(), 502),
        (errors.CancelledStreamError(), 502),
        (errors.StreamError("secret", errors.Code.INTERNAL), 502),
        (errors.ApplicationError(), 502),
        (errors.NoRouteError(), 503),
        (errors.LimitError(), 503),
        (errors.SessionLost(), 503),
        (errors.PeerTimeoutError(), 503),
        (errors.SessionClosedError(), 503),
        (errors.DialTimeoutError(), 504),
        (TimeoutError(), 504),
        (RuntimeError("secret"), 500),
    ],
)
def test_statuses(error: BaseException, status: int) -> None:
    got, phrase = status_for(error)
    assert got == status
    assert "secret" not in phrase
    assert response(got, phrase).startswith(b"HTTP/1.1 %d %s\r\n" % (status, phrase.encode()))
