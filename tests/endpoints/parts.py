"""What tests of the endpoints share: certificates, targets, clients, and pairs of endpoints over real TLS."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

import konnektor as kk
from konnektor import pki
from konnektor.testing import FaultProxy

PATIENCE = 30.0
"""Seconds until a test that waits for what never comes has failed."""


class Certificates:
    """A CA, and whoever is asked for."""

    def __init__(self, folder, trust_domain="konnektor.local"):
        self.folder = folder
        self.ca = pki.init_ca(folder, trust_domain).cert
        self._files = {}

    def __call__(self, role, name, *sans):
        if name not in self._files:
            issued = pki.issue(self.folder, role, name, sans)
            self._files[name] = kk.TLSFiles(self.ca, issued.cert, issued.key)
        return self._files[name]

    def expired(self, role, name):
        """A certificate whose day is over; an honest CA issues none."""
        files = self(role, name)
        own = x509.load_pem_x509_certificate(files.cert.read_bytes())
        builder = x509.CertificateBuilder(
            own.issuer,
            own.subject,
            own.public_key(),
            own.serial_number,
            own.not_valid_before_utc - timedelta(days=9),
            own.not_valid_before_utc - timedelta(days=1),
            list(own.extensions),
        )
        key = load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        files.cert.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return files

    @property
    def plane(self):
        return self("control-plane", "cp")

    def worker(self, name="node-1"):
        return self("worker", name)


async def until(predicate):
    """For what announces itself nowhere; fails if it never comes."""
    async with asyncio.timeout(PATIENCE):
        while not predicate():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def tunnel(certs, *, allow=(), plane=None, name="node-1", **kwargs):
    """A control plane and a worker that is connected to it."""
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane, **(plane or {})) as control_plane:
        allow = allow or ["127.0.0.1:*"]
        async with kk.Worker([control_plane.address], tls=certs.worker(name), allow=allow, **kwargs) as worker:
            session = await control_plane.wait_for(name)
            await worker.wait_connected()
            yield SimpleNamespace(plane=control_plane, worker=worker, session=session)


@asynccontextmanager
async def proxied(certs, *, allow=("127.0.0.1:*",), plane=None, name="node-1", **kwargs):
    """As ``tunnel``, with a ``proxy`` between: ``session`` is the control plane's, ``client`` the worker's."""
    async with (
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane, **(plane or {})) as control_plane,
        FaultProxy(control_plane.address) as proxy,
        kk.Worker([proxy.address], tls=certs.worker(name), allow=allow, **kwargs) as worker,
    ):
        session = await control_plane.wait_for(name)
        client = await worker.wait_connected()
        yield SimpleNamespace(plane=control_plane, proxy=proxy, worker=worker, session=session, client=client)


# -- Targets ----------------------------------------------------------------------------------------------------------


class Target(asyncio.Protocol):
    """Echoes, and half-closes when its client has; keeps what came."""

    def __init__(self, made):
        self.data = bytearray()
        self.eof = asyncio.Event()
        self.lost = asyncio.get_running_loop().create_future()
        made.append(self)

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        self.transport.write(data)

    def eof_received(self):
        self.eof.set()
        return False

    def connection_lost(self, exc):
        self.lost.set_result(exc)


class Banner(Target):
    """Speaks first."""

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.write(b"220 ready\r\n")


class Resetting(Target):
    """Sends a little, then breaks off."""

    def data_received(self, data):
        self.data += data
        self.transport.write(b"half")
        # The reset destroys what is not delivered; give it a moment.
        asyncio.get_running_loop().call_later(0.05, reset, self.transport)


def reset(transport):
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class Goodbye(Target):
    """Answers and ends its own direction; still listens."""

    def data_received(self, data):
        self.data += data
        if len(self.data) == len(data):
            self.transport.write(b"bye")
            self.transport.write_eof()

    def eof_received(self):
        self.eof.set()
        return False


@asynccontextmanager
async def target(kind=Target):
    """A server on loopback: its ``port``, and the connections it ``made``."""
    made = []
    server = await asyncio.get_running_loop().create_server(lambda: kind(made), "127.0.0.1", 0)
    listener = server.sockets[0]
    try:
        yield SimpleNamespace(port=listener.getsockname()[1], made=made, listener=listener)
    finally:
        server.close()
        for connection in made:
            connection.transport.abort()
        for connection in made:
            await connection.lost
        await server.wait_closed()


def unused_port():
    """A port on loopback that refuses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def black_hole():
    """A port whose connections are never answered: its backlog is full. SYNs are dropped, so dialing hangs."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(listener.getsockname())
        yield listener.getsockname()[1]


# -- Clients ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connection(where, **kwargs):
    """Reader and writer to ``HOST:PORT`` or a path."""
    if where.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(where)
    else:
        host, port = where.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port), **kwargs)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def connect_head(to, *headers):
    # Byte for byte what kube-apiserver sends.
    lines = [f"CONNECT {to} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]
    return "\r\n".join(lines).encode()


ESTABLISHED = b"HTTP/1.1 200 Connection Established\r\n\r\n"


async def ask(where, to, *headers, **kwargs):
    """The status line that a CONNECT gets."""
    async with connection(where, **kwargs) as (reader, writer):
        writer.write(connect_head(to, *headers))
        return (await reader.readline()).decode().strip()


# -- Processes --------------------------------------------------------------------------------------------------------


def flags(files):
    """``--ca``, ``--cert`` and ``--key``."""
    return ["--ca", str(files.ca), "--cert", str(files.cert), "--key", str(files.key)]


class Process:
    """The command line as a process of its own; its logs are in ``log``."""

    def __init__(self, log, *arguments, descriptors=None):
        self.log = log

        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "konnektor", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONUNBUFFERED": ""},
                preexec_fn=limit if descriptors else None,  # noqa: PLW1509 - a short one
            )
        self.pid = self._process.pid

    def ready(self):
        """What its ready line says: each key's values."""
        line = self._process.stdout.readline().decode()
        assert line.startswith("ready ") and line.endswith("\n"), (line, self.log.read_text())
        found = {}
        for pair in line.split()[1:]:
            key, _, value = pair.partition("=")
            found.setdefault(key, []).append(value)
        return found

    def signal(self, number=signal.SIGTERM):
        self._process.send_signal(number)

    def wait(self):
        """The exit status; nothing more was on standard output."""
        with self._process.stdout as stdout:
            assert stdout.read() == b""
        return self._process.wait()

    def stop(self):
        self.signal()
        assert self.wait() == 0, self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self._process.kill()
        self._process.stdout.close()
        self._process.wait()


async def round_trip(stream, payload, digests):
    """Sends ``payload`` to an echo and takes it back; both go into ``digests``, (sent, received)."""
    sent, received = digests
    await stream.send(payload)
    sent.update(payload)
    count = 0
    while count < len(payload):
        data = await stream.receive()
        received.update(data)
        count += len(data)
