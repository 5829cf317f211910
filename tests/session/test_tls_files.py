"""Our own certificates, keys and CA files: what is wrong with them is told before anybody connects."""

import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from konnektor.errors import CertificateError, ConfigurationError
from konnektor.handshake import explain
from konnektor.tls import Identity, Role, TLSFiles, check_name, frontend_context, peer_identity
from tests.session.tls_parts import (
    CLIENT_AUTH,
    DOMAIN,
    PLANE_URI,
    SERVER_AUTH,
    WORKER_URI,
    lenient_client,
    meet,
    with_intermediate,
)


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
    refused(other(tmp_path / "nope.pem"), f"^{what} {tmp_path}/nope.pem does not exist; check the path, or .+$")
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


async def test_keys_as_openssl_writes_them(ca, plane, worker, tmp_path):
    key = load_pem_private_key(worker.key.read_bytes(), None)
    classic = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    both = tmp_path / "both.pem"
    both.write_bytes(worker.cert.read_bytes() + parameters + classic)
    met = await meet(plane.server_context(), TLSFiles(str(ca.ca), str(both), str(both)).client_context())
    assert peer_identity(met.server, Role.WORKER, trust_domain=DOMAIN).name == "node-1"


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
    refused(
        worker,
        r"is for a worker \(node-1\), not for a control-plane; give the one of a control-plane, or issue it",
        TLSFiles.server_context,
    )
    refused(
        plane,
        r"is for a control-plane \(cp\), not for a worker; give the one of a worker, or issue it",
        TLSFiles.client_context,
    )
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


# -- The frontend's context -------------------------------------------------------------------------------------------


async def test_frontend_takes_clients_of_its_own_ca(ca, foreign, plane, worker):
    context = frontend_context(plane.cert, plane.key, foreign.ca)
    caller = lenient_client(foreign.forge("kube", [], [CLIENT_AUTH]), alpn="h2")
    caller.maximum_version = ssl.TLSVersion.TLSv1_2
    met = await meet(context, caller)
    assert met.server.version() == "TLSv1.2" and met.server.selected_alpn_protocol() is None
    assert "was not issued by a CA that we trust" in explain((await meet(context, lenient_client(worker))).server, "C")
    assert "sent no certificate" in explain((await meet(context, lenient_client(None))).server, "C")


def test_a_relative_path_is_told_in_full(worker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        TLSFiles(worker.ca, "pki/nope.pem", worker.key), f"^certificate file {tmp_path}/pki/nope.pem does not exist; "
    )


def test_frontend_files(ca, plane, worker, tmp_path):
    for arguments, sentence in (
        ((worker.cert, worker.key, ca.ca), "is not for servers: its extended key usage lacks serverAuth"),
        ((plane.cert, worker.key, ca.ca), "does not belong to certificate file"),
        (
            (plane.cert, plane.key, tmp_path / "no"),
            "^CA file .*/no does not exist; check the path, or copy the CA's ca.pem there$",
        ),
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
