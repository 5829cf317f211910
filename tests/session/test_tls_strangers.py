"""Peers that speak something else than TLS, or nothing; and the sentence for whatever ends an attempt."""

import asyncio
import errno
import socket
import ssl

import pytest

from konnektor.errors import Code, HandshakeError, SessionError, session_error
from konnektor.handshake import explain, with_alerts
from tests.session.tls_parts import End


async def talk_to_server(context, data):
    """What the server makes of raw bytes."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setblocking(False)
        client.setblocking(False)
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, data)
        if not data:
            client.shutdown(socket.SHUT_WR)
        sock, _ = await loop.sock_accept(listener)
        with pytest.raises(OSError) as caught:
            await loop.connect_accepted_socket(End, sock, ssl=with_alerts(context, sock))
        return caught.value


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "W speaks plain HTTP, and this is a TLS port for konnektor endpoints"),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", "W speaks plain HTTP, and this is a TLS port for konnektor endpoints"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "W speaks something other than TLS; is that the port of a konnektor endpoint?"),
        (b"\x16\x03\x01\xff\xff" + b"x" * 64, "W speaks something other than TLS"),
        (b"\0" * 64, "W speaks something other than TLS"),
        (b"", "W broke off the connection before a session was up"),
    ],
)
async def test_a_server_met_by_something_else(plane, data, sentence):
    assert explain(await talk_to_server(plane.server_context(), data), "W").startswith(sentence)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "CP speaks something other than TLS; is that the port"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "CP speaks something other than TLS"),
        (b"", "CP broke off the connection before a session was up"),
    ],
)
async def test_a_client_that_dialed_something_else(worker, data, sentence):
    loop = asyncio.get_running_loop()

    async def answer():
        sock, _ = await loop.sock_accept(listener)
        with sock:
            await loop.sock_recv(sock, 4096)
            await loop.sock_sendall(sock, data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        task = asyncio.create_task(answer())
        address = listener.getsockname()
        with pytest.raises(OSError) as caught:
            await loop.create_connection(End, *address, ssl=worker.client_context(), server_hostname="cp")
        await task
    assert explain(caught.value, "CP").startswith(sentence)


@pytest.mark.needs_tool("openssl")
async def test_a_tls_server_that_does_not_know_our_protocol(plane, worker):
    """It sends alert 120, for which Python 3.11 has no name."""
    server = await asyncio.create_subprocess_exec(
        *("openssl", "s_server", "-accept", "127.0.0.1:0", "-alpn", "h2", "-cert", plane.cert, "-key", plane.key),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        _ = await server.stdout.readuntil(b"ACCEPT ")
        port = int((await server.stdout.readline()).rpartition(b":")[2])
        with pytest.raises(ssl.SSLError) as caught:
            await asyncio.get_running_loop().create_connection(
                End, "127.0.0.1", port, ssl=worker.client_context(), server_hostname="cp"
            )
    finally:
        server.kill()
        _ = await server.communicate()
    assert explain(caught.value, "CP") == (
        "CP speaks TLS but not konnektor/1; is that the port of a konnektor endpoint?"
    )


async def test_nobody_there(worker):
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(OSError) as caught:
        await loop.create_connection(End, *address, ssl=worker.client_context(), server_hostname="cp")
    assert explain(caught.value, "CP") == (
        "CP does not accept connections (connection refused); is it running, and is the port right?"
    )


async def test_a_peer_that_never_answers(worker):
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(OSError) as caught:
            await loop.create_connection(
                End,
                *listener.getsockname(),
                ssl=worker.client_context(),
                server_hostname="cp",
                ssl_handshake_timeout=0.05,
            )
        assert explain(caught.value, "CP") == "CP did not finish the TLS handshake in time; does it speak TLS?"


@pytest.mark.parametrize(
    ("exc", "sentence"),
    [
        (socket.gaierror(-2, "Name or service not known"), "CP cannot be found: Name or service not known; check"),
        (TimeoutError(), "CP did not answer in time; check the address"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "CP cannot be reached: Network is unreachable"),
        (OSError("Multiple exceptions: [Errno 111] a, [Errno 113] b"), "CP cannot be reached: Multiple exceptions"),
        (ConnectionResetError(), "CP broke off the connection"),
        (BrokenPipeError(), "CP broke off the connection"),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "CP closed the connection before"),
        (ssl.SSLError(1, "odd"), "TLS with CP failed: odd"),
        (ssl.SSLError(1, "[SSL] tlsv1 alert odd (_ssl.c:1006)"), "TLS with CP failed: tlsv1 alert odd"),
        (ssl.SSLError(1, "[SSL] tlsv1 alert unknown ca (_ssl.c:1006)"), "CP refused our certificate: unknown ca"),
        (HandshakeError("said already"), "said already"),
        (session_error(Code.NO_ERROR), "CP closed the session at its very beginning: it gave no reason"),
        (session_error(Code.NO_ERROR, "full"), "CP closed the session at its very beginning: full"),
        (session_error(31, "odd"), "no session with CP: odd"),
        (SessionError("connection lost", Code.INTERNAL), "CP closed the connection before a session was up"),
        (ValueError("odd\nthing"), "no session with CP: ValueError: odd"),
        (ssl.SSLCertVerificationError(1, "odd"), "the certificate of CP is refused"),
    ],
)
def test_explanations_without_a_handshake(exc, sentence):
    if isinstance(exc, ssl.SSLCertVerificationError):
        exc.verify_code, exc.verify_message = 23, "certificate revoked"
    text = explain(exc, "CP")
    assert text.startswith(sentence) and "\n" not in text


@pytest.mark.parametrize("reason", ["SSL/TLS_ALERT_BAD_CERTIFICATE", "ssl/tls alert bad certificate"])
def test_alerts_by_the_names_of_later_openssl(reason):
    error = ssl.SSLError(1, "x")
    error.reason = reason
    assert "CP refused our certificate: bad certificate" in explain(error, "CP")
