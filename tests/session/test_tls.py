"""tls.py, in real handshakes on loopback: who gets in, who does not, and what either side is told."""

import asyncio
import errno
import re
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from konnektor import pki
from konnektor.errors import CertificateError, ConfigurationError, HandshakeError
from konnektor.handshake import explain, with_alerts
from konnektor.tls import (
    Identity,
    Role,
    TLSFiles,
    check_name,
    frontend_context,
    peer_identity,
)

DOMAIN = "konnektor.local"
WORKER_URI = f"spiffe://{DOMAIN}/worker/w"
PLANE_URI = f"spiffe://{DOMAIN}/control-plane/cp"
CLIENT_AUTH, SERVER_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


class Authority:
    """A CA directory that issues good certificates (``issue``) and odd ones (``forge``)."""

    def __init__(self, folder, trust_domain=DOMAIN):
        self.folder = folder
        self.ca = pki.init_ca(folder, trust_domain).cert

    def issue(self, role, name, sans=()):
        issued = pki.issue(self.folder, role, name, sans)
        return TLSFiles(self.ca, issued.cert, issued.key)

    def forge(
        self, name, uris, usages, *, hosts=("cp",), start=-1.0, end=1.0, ca=False, key_identifier=True, issuer=None
    ):
        """A certificate signed by this CA (or by ``issuer``, files from before); ``start``, ``end`` in days from now."""
        cert_file, key_file = (issuer.cert, issuer.key) if issuer else (self.folder / "ca.pem", self.folder / "ca.key")
        signer = x509.load_pem_x509_certificate(cert_file.read_bytes())
        signing_key = load_pem_private_key(key_file.read_bytes(), None)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(pki._common_name(name))
            .issuer_name(signer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=start))
            .not_valid_after(now + timedelta(days=end))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(pki._key_usage(signs=ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        names = [x509.UniformResourceIdentifier(uri) for uri in uris] + [x509.DNSName(host) for host in hosts]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if key_identifier:
            identifier = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            builder = builder.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
            )
        certificate = builder.sign(signing_key, hashes.SHA256())
        issued = pki._write(self.folder / f"{name}.pem", certificate, self.folder / f"{name}.key", key)
        return TLSFiles(self.ca, issued.cert, issued.key)


@pytest.fixture
def ca(tmp_path):
    return Authority(tmp_path / "pki")


@pytest.fixture
def foreign(tmp_path):
    return Authority(tmp_path / "foreign")


@pytest.fixture
def plane(ca):
    return ca.issue("control-plane", "cp")


@pytest.fixture
def worker(ca):
    return ca.issue("worker", "node-1")


# -- Handshakes -------------------------------------------------------------------------------------------------------


class End(asyncio.Protocol):
    def __init__(self):
        self.lost = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc):
        self.lost.set_result(exc)


@dataclass
class Met:
    """What came of it, at either side: an SSLObject, or what ended it (None: the connection, without a reason)."""

    server: object
    client: object


async def meet(server, client, *, name="cp", alerts=True):
    """A handshake between two contexts, as an endpoint does it."""
    loop = asyncio.get_running_loop()

    async def accept():
        sock, _ = await loop.sock_accept(listener)
        end = End()  # uvloop returns another protocol than this one
        context = with_alerts(server, sock) if alerts else server
        transport, _ = await loop.connect_accepted_socket(lambda: end, sock, ssl=context)
        return transport, end

    async def dial():
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, listener.getsockname())
        return await loop.create_connection(End, sock=sock, ssl=with_alerts(client, sock), server_hostname=name)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        outcomes = await asyncio.gather(accept(), dial(), return_exceptions=True)
    ends = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    if len(ends) == 2:
        result = Met(*(transport.get_extra_info("ssl_object") for transport, _ in ends))
        for transport, _ in ends:
            transport.close()
        for _, protocol in ends:
            await protocol.lost
        return result
    # One side refused; the other, if it thinks that it is connected, will hear of it.
    return Met(*[await outcome[1].lost if isinstance(outcome, tuple) else outcome for outcome in outcomes])


def lenient(side, files, *, alpn="konnektor/1"):
    """A peer that does not check itself (or us), as an attacker's would not."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols([alpn])
    if files:
        context.load_cert_chain(files.cert, files.key)
    return context


def lenient_client(files, **options):
    return lenient(ssl.PROTOCOL_TLS_CLIENT, files, **options)


def lenient_server(files, **options):
    return lenient(ssl.PROTOCOL_TLS_SERVER, files, **options)


async def test_two_ends_know_each_other(plane, worker):
    met = await meet(plane.server_context(), worker.client_context())
    assert peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN) == Identity(DOMAIN, Role.WORKER, "node-1")
    assert peer_identity(met.client, Role.CONTROL_PLANE, trust_domain=DOMAIN).name == "cp"
    assert met.server.version() == "TLSv1.3" and not met.client.session_reused


@pytest.mark.parametrize("name", ["cp", "localhost", "127.0.0.1", "::1"])
async def test_a_trial_on_one_machine_works_by_any_local_name(plane, worker, name):
    met = await meet(plane.server_context(), worker.client_context(), name=name)
    assert peer_identity(met.client, Role.CONTROL_PLANE, trust_domain=DOMAIN).name == "cp"


async def test_no_session_tickets(plane, worker):
    met = await meet(plane.server_context(), worker.client_context())
    assert met.client.session is None or not met.client.session.has_ticket


async def test_client_role_may_dial_when_asked_for(ca, plane):
    client = ca.issue("client", "api")
    met = await meet(plane.server_context(), client.client_context(Role.CLIENT))
    assert peer_identity(met.server, Role.CLIENT, trust_domain=DOMAIN).name == "api"
    with pytest.raises(CertificateError, match=r"is for a client \(api\), not for a worker"):
        peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN)


async def test_tls_12_is_refused(plane, worker):
    old = lenient_client(worker)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    met = await meet(plane.server_context(), old)
    assert (
        explain(met.server, "the worker at X")
        == "the worker at X does not speak TLS 1.3; is that a konnektor endpoint?"
    )
    assert explain(met.client, "CP") == "CP does not speak TLS 1.3; is that a konnektor endpoint?"  # by its alert


# -- Refused certificates, told to both sides -------------------------------------------------------------------------


async def test_foreign_worker_is_refused_and_told_so(plane, foreign):
    stranger = foreign.issue("worker", "node-1")
    met = await meet(plane.server_context(), lenient_client(stranger))
    assert explain(met.server, "the worker at X") == (
        "the certificate of the worker at X was not issued by a CA that we trust (unable to get local issuer "
        "certificate); issue it from our CA, or add its CA to our CA file"
    )
    assert explain(met.client, "the control plane at Y") == (
        "the control plane at Y refused our certificate: unknown ca (tlsv1 alert unknown ca); "
        "issue it from the CA that the other side trusts"
    )


async def test_without_alerts_the_refused_side_gets_a_loss_without_a_reason(plane, foreign):
    """The pitfall of TLS 1.3 under asyncio and uvloop that with_alerts() is for."""
    met = await meet(plane.server_context(), lenient_client(foreign.issue("worker", "w")), alerts=False)
    assert isinstance(met.server, ssl.SSLCertVerificationError) and met.client is None
    assert explain(met.client, "CP").startswith("CP closed the connection before a session was up and gave no reason")


async def test_foreign_control_plane_is_refused_and_told_so(worker, foreign):
    met = await meet(lenient_server(foreign.issue("control-plane", "cp")), worker.client_context())
    assert "was not issued by a CA that we trust" in explain(met.client, "CP")
    assert "W refused our certificate: unknown ca" in explain(met.server, "W")


async def test_wrong_server_name_lists_the_right_ones(ca, worker):
    plane = ca.issue("control-plane", "cp", ["cp.example", "192.0.2.7"])
    met = await meet(plane.server_context(), worker.client_context(), name="other.example")
    assert explain(met.client, "the control plane at Y") == (
        "the certificate of the control plane at Y is not for the name other.example; "
        "use --server-name with one of its names: cp, cp.example, 192.0.2.7"
    )
    assert "W refused our certificate: bad certificate" in explain(met.server, "W")
    met = await meet(plane.server_context(), worker.client_context(), name="127.0.0.1")
    assert "is not for the name 127.0.0.1; use --server-name" in explain(met.client, "CP")


async def test_the_common_name_is_no_host_name(ca, worker):
    plane = ca.forge("cp", [PLANE_URI], [SERVER_AUTH], hosts=())
    met = await meet(plane.server_context(), worker.client_context(), name="cp")
    assert explain(met.client, "CP").endswith("use --server-name with one of its names: none")


async def test_expired_worker(ca, plane):
    met = await meet(plane.server_context(), lenient_client(ca.forge("w", [WORKER_URI], [CLIENT_AUTH], end=-0.5)))
    assert explain(met.server, "W").startswith("the certificate of W expired; issue a new one")
    assert "CP refused our certificate: certificate expired" in explain(met.client, "CP")


async def test_expired_control_plane(ca, worker):
    server = lenient_server(ca.forge("cp", [PLANE_URI], [SERVER_AUTH], end=-0.5))
    met = await meet(server, worker.client_context())
    assert re.match(r"the certificate of CP expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC; issue", explain(met.client, "CP"))
    assert "W refused our certificate: certificate expired" in explain(met.server, "W")


async def test_not_yet_valid_control_plane(ca, worker):
    server = lenient_server(ca.forge("cp", [PLANE_URI], [SERVER_AUTH], start=0.5))
    met = await meet(server, worker.client_context())
    assert re.match(
        r"the certificate of CP is not valid before \d{4}-.* UTC; check the clocks", explain(met.client, "CP")
    )
    assert "W refused our certificate: bad certificate" in explain(met.server, "W")


async def test_not_yet_valid_worker(ca, plane):
    met = await meet(plane.server_context(), lenient_client(ca.forge("w", [WORKER_URI], [CLIENT_AUTH], start=0.5)))
    assert explain(met.server, "W") == "the certificate of W is not valid yet; check the clocks of both machines"


async def test_a_worker_cannot_act_as_control_plane(ca, worker):
    impostor = ca.issue("worker", "w2", ["cp"])
    met = await meet(lenient_server(impostor), worker.client_context())
    assert explain(met.client, "CP").startswith("the certificate of CP is for another role than it has here")
    assert "W refused our certificate: unsupported certificate" in explain(met.server, "W")


async def test_a_control_plane_cannot_act_as_worker(plane):
    met = await meet(plane.server_context(), lenient_client(plane))
    assert explain(met.server, "W").startswith("the certificate of W is for another role than it has here")
    assert "CP refused our certificate: unsupported certificate" in explain(met.client, "CP")


async def test_no_certificate(plane):
    met = await meet(plane.server_context(), lenient_client(None))
    assert explain(met.server, "W") == ("W sent no certificate; konnektor endpoints must have one, issued by our CA")
    assert explain(met.client, "CP") == "CP wants a certificate, and we sent none"


async def test_a_certificate_without_the_identifiers_of_rfc_5280(ca, plane):
    met = await meet(
        plane.server_context(), lenient_client(ca.forge("w", [WORKER_URI], [CLIENT_AUTH], key_identifier=False))
    )
    assert explain(met.server, "W") == (
        "the certificate of W is refused: Missing Authority Key Identifier; issue it again"
    )


# -- Verified by OpenSSL, refused by us -------------------------------------------------------------------------------

NO_IDENTITY = "the certificate of W is refused: it has no konnektor identity"


@pytest.mark.parametrize(
    ("uris", "usages", "sentence"),
    [
        ([], [CLIENT_AUTH], NO_IDENTITY),
        ([WORKER_URI, WORKER_URI], [CLIENT_AUTH], "it has 2 URIs where exactly one must be"),
        ([WORKER_URI, "https://x.example"], [CLIENT_AUTH], "it has 2 URIs where exactly one must be"),
        (["https://x.example/worker/w"], [CLIENT_AUTH], "is not a konnektor identity"),
        ([f"spiffe://{DOMAIN}/client/w"], [CLIENT_AUTH], r"it is for a client \(w\), not for a worker"),
        ([PLANE_URI], [CLIENT_AUTH], r"it is for a control-plane \(cp\), not for a worker"),
        (
            ["spiffe://other.example/worker/w"],
            [CLIENT_AUTH],
            "trust domain other.example, not to ours, konnektor.local",
        ),
        ([WORKER_URI], [], "its extended key usage lacks clientAuth, which a worker needs"),
        (
            [WORKER_URI],
            [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, CLIENT_AUTH, SERVER_AUTH],
            None,  # odd, but it may be a worker
        ),
    ],
)
async def test_what_openssl_lets_through(ca, plane, uris, usages, sentence):
    peer = ca.forge("w", uris, usages)
    met = await meet(plane.server_context(), lenient_client(peer))
    if sentence is None:
        assert peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN).name == "w"
        return
    with pytest.raises(CertificateError, match=sentence) as caught:
        peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN, peer="W")
    assert explain(caught.value, "W") == str(caught.value) and "\n" not in str(caught.value)


async def test_any_extended_key_usage_is_no_role(ca, worker):
    server = lenient_server(ca.forge("cp", [PLANE_URI], []))
    met = await meet(server, worker.client_context())
    with pytest.raises(CertificateError, match="lacks serverAuth, which a control-plane needs"):
        peer_identity(met.client, Role.CONTROL_PLANE, trust_domain=DOMAIN)


async def test_another_protocol_inside_tls(plane, worker):
    for alpn in (None, "h2"):
        met = await meet(plane.server_context(), lenient_client(worker, alpn=alpn))
        if isinstance(met.server, ssl.SSLObject):
            with pytest.raises(CertificateError, match=r"W speaks TLS but not konnektor/1; is it"):
                peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN, peer="W")
        else:
            assert alpn == "h2" and "konnektor/1" in explain(met.client, "CP")


async def test_a_peer_without_a_certificate_or_tls_13_has_no_identity(plane, worker):
    server = lenient_server(plane)
    met = await meet(server, worker.client_context())
    with pytest.raises(CertificateError, match="W sent no certificate"):
        peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN, peer="W")
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    met = await meet(server, lenient_client(worker))
    with pytest.raises(CertificateError, match=r"W agreed on TLSv1\.2, not on TLSv1\.3"):
        peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN, peer="W")


# -- Chains and bundles -----------------------------------------------------------------------------------------------


def with_intermediate(ca, folder):
    """The CA again without a path length, an intermediate below it, and a worker's certificate below that."""
    key = load_pem_private_key((ca.folder / "ca.key").read_bytes(), None)
    subject, now = pki._common_name("root"), pki._now()
    root = (
        pki._builder(subject, key.public_key(), now, now + timedelta(days=9))
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(pki._key_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir()
    (folder / "root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    pki._write(ca.folder / "root.pem", root, ca.folder / "root.key", key)
    middle = ca.forge(
        "middle", [], [], hosts=(), ca=True, issuer=TLSFiles("", ca.folder / "root.pem", ca.folder / "root.key")
    )
    leaf = ca.forge("deep", [f"spiffe://{DOMAIN}/worker/deep"], [CLIENT_AUTH], issuer=middle)
    chain = folder / "chain.pem"
    chain.write_bytes(leaf.cert.read_bytes() + middle.cert.read_bytes())
    return folder / "root.pem", middle.cert, chain, leaf


async def test_a_chain_with_an_intermediate_ca(ca, plane, tmp_path):
    root, middle, chain, leaf = with_intermediate(ca, tmp_path / "chain")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(plane.ca.read_bytes() + root.read_bytes())
    server = TLSFiles(bundle, plane.cert, plane.key).server_context()
    client = TLSFiles(bundle, chain, leaf.key).client_context()
    met = await meet(server, client)
    assert peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN).name == "deep"
    TLSFiles(middle, leaf.cert, leaf.key).client_context()  # an intermediate may be the trust anchor
    with pytest.raises(CertificateError, match="was not issued by a CA in"):
        TLSFiles(root, leaf.cert, leaf.key).client_context()  # the intermediate is missing


async def test_rotation_both_cas_in_the_file(ca, foreign, plane, tmp_path):
    bundle = tmp_path / "both.pem"
    bundle.write_bytes(foreign.ca.read_bytes() + ca.ca.read_bytes())
    newcomer = foreign.issue("worker", "new")
    server = TLSFiles(bundle, plane.cert, plane.key).server_context()
    met = await meet(server, TLSFiles(bundle, newcomer.cert, newcomer.key).client_context())
    assert peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN).name == "new"


# -- Peers that speak something else ----------------------------------------------------------------------------------


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
        (ssl.SSLError(1, "odd"), "TLS with CP failed: "),
        (HandshakeError("said already"), "said already"),
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


# -- Our own files ----------------------------------------------------------------------------------------------------


def use(files):
    """Load for whatever the certificate's role is."""
    return files.server_context() if "cp" in str(files.cert) else files.client_context()


def refused(files, sentence, call=use):
    with pytest.raises(CertificateError, match=sentence) as caught:
        call(files)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("field", ["ca", "cert", "key"])
def test_every_file_missing_directory_or_garbage(worker, tmp_path, field):
    def other(path):
        return TLSFiles(**{"ca": worker.ca, "cert": worker.cert, "key": worker.key, field: path})

    what = {"ca": "CA file", "cert": "certificate file", "key": "key file"}[field]
    kind = "private key" if field == "key" else "certificate"
    refused(other(tmp_path / "nope.pem"), f"^{what} .*nope.pem does not exist$")
    refused(other(tmp_path), f"^{what} .* is a directory; name the file inside it$")
    refused(other("a\0b"), f"^{what} .* cannot be read: embedded null byte$")
    refused(other("/dev/zero"), f"^{what} /dev/zero is larger than 1048576 bytes: not a PEM file$")
    bad = tmp_path / "bad.pem"
    bad.write_bytes(b"hello\xff")
    refused(other(bad), f"^{what} .*bad.pem holds no {kind} in PEM form, but something else$")
    bad.write_bytes(b"")
    refused(other(bad), f"holds no {kind} in PEM form")
    label = kind.upper().encode()
    bad.write_bytes(b"-----BEGIN %s-----\nAAAA\n-----END %s-----\n" % (label, label))
    refused(other(bad), f"^{what} .*bad.pem holds a damaged {kind}: ")


def test_unreadable(worker, monkeypatch):
    def denied(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    refused(worker, "may not be read by this user; change its owner, or run as")


def test_swapped_and_mismatched(ca, worker):
    refused(TLSFiles(ca.ca, worker.key, worker.cert), "holds no certificate in PEM form, but a private key")
    refused(TLSFiles(ca.ca, worker.cert, worker.cert), "holds no private key in PEM form, but a certificate")
    refused(TLSFiles(worker.cert, worker.cert, worker.key), r"holds a certificate that is not a CA's \('CN=node-1'\)")
    other = ca.issue("worker", "other")
    refused(TLSFiles(ca.ca, worker.cert, other.key), "does not belong to certificate file .*; give the two files")


def test_encrypted_key(ca, worker, tmp_path):
    key = load_pem_private_key(worker.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        locked.write_bytes(key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"x")))
        refused(TLSFiles(ca.ca, worker.cert, locked), "is encrypted, and nobody is there .* openssl pkey -in FILE")


def test_keys_as_openssl_writes_them(ca, worker, tmp_path):
    key = load_pem_private_key(worker.key.read_bytes(), None)
    classic = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    both = tmp_path / "both.pem"
    both.write_bytes(worker.cert.read_bytes() + parameters + classic)
    TLSFiles(str(ca.ca), str(both), str(both)).client_context()


def test_own_dates(ca):
    day = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"
    refused(
        ca.forge("w1", [WORKER_URI], [CLIENT_AUTH], end=-0.5),
        rf"^certificate file .*w1.pem expired on {day} \(now {day}\); issue a new one$",
    )
    refused(
        ca.forge("w2", [WORKER_URI], [CLIENT_AUTH], start=0.5),
        rf"^certificate file .*w2.pem is not valid before {day} \(now {day}\); check this machine's clock$",
    )


def test_dates_of_the_authorities(ca, worker, tmp_path):
    old = ca.forge("old-ca", [], [], hosts=(), ca=True, end=-0.5)
    refused(TLSFiles(old.cert, worker.cert, worker.key), r"^CA file .*old-ca.pem expired on")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(old.cert.read_bytes() + ca.ca.read_bytes())
    TLSFiles(bundle, worker.cert, worker.key).client_context()  # one in a bundle may be past
    below = ca.forge("below", [WORKER_URI], [CLIENT_AUTH], issuer=old)
    refused(TLSFiles(bundle, below.cert, below.key), r"^CA file .*bundle.pem expired on")


def test_an_expired_intermediate(ca, tmp_path):
    root, _, _, _ = with_intermediate(ca, tmp_path / "chain")
    issuer = TLSFiles("", ca.folder / "root.pem", ca.folder / "root.key")
    old = ca.forge("old", [], [], hosts=(), ca=True, end=-0.5, issuer=issuer)
    leaf = ca.forge("leaf", [WORKER_URI], [CLIENT_AUTH], issuer=old)
    chain = tmp_path / "leaf-chain.pem"
    chain.write_bytes(leaf.cert.read_bytes() + old.cert.read_bytes())
    refused(TLSFiles(root, chain, leaf.key), "^certificate file .*leaf-chain.pem expired on")


def test_own_certificate_of_another_ca(ca, foreign, worker, plane):
    refused(TLSFiles(foreign.ca, worker.cert, worker.key), "was not issued by a CA in .*foreign/ca.pem; issue it from")
    refused(TLSFiles(foreign.ca, plane.cert, plane.key), "was not issued by a CA in .*foreign/ca.pem; issue it from")


def test_own_certificate_that_strict_peers_refuse(ca):
    refused(
        ca.forge("w", [WORKER_URI], [CLIENT_AUTH], key_identifier=False),
        "does not pass verification with CA file .*: Missing Authority Key Identifier; issue it again",
    )


@pytest.mark.parametrize(
    ("uris", "sentence"),
    [
        ([], r"^certificate file .* cannot be used: it has no konnektor identity .*; issue one with konnektor pki"),
        ([WORKER_URI] * 2, "it has 2 URIs where exactly one must be"),
        (["spiffe://x/y"], "'spiffe://x/y' is not a konnektor identity"),
    ],
)
def test_own_identity(ca, uris, sentence):
    refused(ca.forge("w", uris, [CLIENT_AUTH]), sentence)
    refused(TLSFiles(ca.ca, ca.folder / "w.pem", ""), sentence, TLSFiles.identity)


def test_own_identity_without_any_alternative_name(ca):
    refused(ca.forge("w", [], [CLIENT_AUTH], hosts=()), "it has no konnektor identity")


def test_own_role_and_usage(ca, plane, worker):
    refused(worker, r"is for a worker \(node-1\), not for a control-plane; issue one", TLSFiles.server_context)
    refused(plane, r"is for a control-plane \(cp\), not for a worker; issue one", TLSFiles.client_context)
    refused(ca.issue("client", "api"), r"is for a client \(api\), not for a worker", TLSFiles.client_context)
    refused(ca.forge("w", [WORKER_URI], [SERVER_AUTH]), "its extended key usage lacks clientAuth, which a worker needs")
    refused(ca.forge("cp2", [PLANE_URI], [CLIENT_AUTH]), "lacks serverAuth, which a control-plane needs")
    refused(ca.forge("ca2", [WORKER_URI], [CLIENT_AUTH], ca=True), "it is a CA's certificate, which signs others")
    with pytest.raises(ConfigurationError, match="a control plane does not dial"):
        plane.client_context(Role.CONTROL_PLANE)


def test_files_that_change_while_they_are_read(ca, worker, monkeypatch):
    other = ca.issue("worker", "other")
    monkeypatch.setattr(
        "konnektor.tls._read_pair", lambda *_: [x509.load_pem_x509_certificate(worker.cert.read_bytes())]
    )
    refused(TLSFiles(ca.ca, worker.cert, other.key), "cannot be used: key values mismatch")


# -- The key log ------------------------------------------------------------------------------------------------------


@pytest.fixture
def key_log(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(path))
    return path


async def test_the_key_log_has_the_secrets_of_real_connections(plane, worker, key_log, caplog):
    server = plane.server_context()
    assert "TLS secrets go to" in caplog.text
    assert key_log.stat().st_mode & 0o777 == 0o600
    secrets = lambda: [line for line in key_log.read_text().splitlines() if not line.startswith("#")]
    assert secrets() == []  # nor those of rehearsals
    await meet(server, worker.client_context())
    assert len({line.split()[1] for line in secrets()}) == 1  # one connection's
    assert {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"} <= {line.split()[0] for line in secrets()}


def test_the_key_log_of_a_frontend(ca, plane, key_log):
    assert frontend_context(plane.cert, plane.key, ca.ca).keylog_filename == str(key_log)


def test_no_key_log_unless_asked_for(worker, key_log, monkeypatch, caplog):
    monkeypatch.setattr("konnektor.tls.sys", SimpleNamespace(flags=SimpleNamespace(ignore_environment=1)))
    assert worker.client_context().keylog_filename is None
    monkeypatch.undo()
    monkeypatch.setenv("SSLKEYLOGFILE", "")
    assert worker.client_context().keylog_filename is None
    assert not key_log.exists() and not caplog.records


def test_a_key_log_that_cannot_be_written(worker, monkeypatch, tmp_path):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "no" / "keys"))
    sentence = "^key log .*keys cannot be written: No such file or directory; change SSLKEYLOGFILE, or unset it$"
    with pytest.raises(ConfigurationError, match=sentence):
        worker.client_context()


# -- The frontend's context -------------------------------------------------------------------------------------------


async def test_frontend_takes_clients_of_its_own_ca(ca, foreign, plane, worker):
    context = frontend_context(plane.cert, plane.key, foreign.ca)
    caller = lenient_client(foreign.forge("kube", [], [CLIENT_AUTH]), alpn="h2")
    caller.maximum_version = ssl.TLSVersion.TLSv1_2
    met = await meet(context, caller)
    assert met.server.version() == "TLSv1.2" and met.server.selected_alpn_protocol() is None
    assert "was not issued by a CA that we trust" in explain((await meet(context, lenient_client(worker))).server, "C")
    assert "sent no certificate" in explain((await meet(context, lenient_client(None))).server, "C")


def test_frontend_files(ca, plane, worker, tmp_path):
    for arguments, sentence in (
        ((worker.cert, worker.key, ca.ca), "is not for servers: its extended key usage lacks serverAuth"),
        ((plane.cert, worker.key, ca.ca), "does not belong to certificate file"),
        ((plane.cert, plane.key, tmp_path / "no"), "^CA file .* does not exist$"),
        ((plane.cert, plane.key, plane.cert), "holds a certificate that is not a CA's"),
    ):
        with pytest.raises(CertificateError, match=sentence):
            frontend_context(*arguments)
    plain = ca.forge("plain", [], [])  # no extended key usage at all: any use
    frontend_context(plain.cert, plain.key, ca.ca)


# -- Identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_identities_survive_a_round_trip(role):
    identity = Identity("a-b.example", role, "n.1-x")
    assert Identity.parse(str(identity)) == identity
    assert str(identity) == f"spiffe://a-b.example/{role.value}/n.1-x"


@pytest.mark.parametrize(
    "uri",
    [
        "", "spiffe://", "spiffe://a", "spiffe://a/worker", "spiffe://a/worker/", "spiffe:///worker/b",
        "spiffe://a/worker/b/c", "spiffe://a/worker/b/", "spiffe://a/admin/b", "spiffe://a/Worker/b",
        "SPIFFE://a/worker/b", "https://a/worker/b", "spiffe://A/worker/b", "spiffe://a:1/worker/b",
        "spiffe://u@a/worker/b", "spiffe://a/worker/b?x", "spiffe://a/worker/b#x", "spiffe://a/worker/b%61",
        "spiffe://a/worker/B", "spiffe://a/worker/b\n", "\nspiffe://a/worker/b", "spiffe://a/worker/-b",
        "spiffe://a/worker/..", "spiffe://a_b/worker/b", "spiffe://" + "a" * 64 + "/worker/b",
        "spiffe://a/worker/" + "b" * 64, "spiffe://" + "a." * 128 + "a/worker/b",
    ],
)  # fmt: skip
def test_what_is_no_identity(uri):
    with pytest.raises(CertificateError, match="is not a konnektor identity") as caught:
        Identity.parse(uri)
    assert "\n" not in str(caught.value)


def test_names():
    for name in ("a", "0", "node-1", "a.b", "a..b", "x" * 63):
        assert check_name(name) == name
    for name in ("", "-", "a-", ".a", "A", "a_b", "a/b", "a\n", "x" * 64, "ä"):
        with pytest.raises(ConfigurationError, match="cannot be a name"):
            check_name(name)


def test_what_a_peer_calls_itself_cannot_forge_a_line_of_the_log():
    with pytest.raises(CertificateError) as caught:
        Identity.parse("spiffe://a/worker/b\n2026 everything is fine" + "x" * 1000)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
