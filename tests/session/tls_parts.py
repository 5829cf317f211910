"""What tests of TLS share: authorities good and odd, and handshakes between two contexts."""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from konnektor import pki
from konnektor.handshake import with_alerts
from konnektor.tls import TLSFiles

DOMAIN = "konnektor.local"
WORKER_URI = f"spiffe://{DOMAIN}/worker/w"
PLANE_URI = f"spiffe://{DOMAIN}/control-plane/cp"
CLIENT_AUTH, SERVER_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


class Issuer:
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
