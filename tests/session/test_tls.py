"""Mutual TLS in real handshakes on loopback: who gets in, who does not, and what either side is told."""

import re
import ssl

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from konnektor.errors import CertificateError
from konnektor.handshake import explain
from konnektor.tls import Identity, Role, TLSFiles, peer_identity
from tests.session.tls_parts import (
    CLIENT_AUTH,
    DOMAIN,
    PLANE_URI,
    SERVER_AUTH,
    WORKER_URI,
    lenient_client,
    lenient_server,
    meet,
    with_intermediate,
)


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
        "the certificate of the worker at X was not issued by a CA that we trust (self-signed "
        "certificate in certificate chain); issue it from our CA, or add its CA to our CA file"
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
    assert re.fullmatch(
        r"the certificate of W \(spiffe://konnektor\.local/worker/w\) expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC; "
        "issue a new one, and check the clocks of both machines",
        explain(met.server, "W"),
    )
    assert "CP refused our certificate: certificate expired" in explain(met.client, "CP")


async def test_expired_control_plane(ca, worker):
    server = lenient_server(ca.forge("cp", [PLANE_URI], [SERVER_AUTH], end=-0.5))
    met = await meet(server, worker.client_context())
    assert re.match(
        r"the certificate of CP \(spiffe://.*/cp\) expired on \d{4}-.* UTC; issue", explain(met.client, "CP")
    )
    assert "W refused our certificate: certificate expired" in explain(met.server, "W")


async def test_not_yet_valid_control_plane(ca, worker):
    server = lenient_server(ca.forge("cp", [PLANE_URI], [SERVER_AUTH], start=0.5))
    met = await meet(server, worker.client_context())
    assert re.match(
        r"the certificate of CP \(spiffe://.*/cp\) is not valid before \d{4}-.* UTC; check the clocks",
        explain(met.client, "CP"),
    )
    assert "W refused our certificate: bad certificate" in explain(met.server, "W")


async def test_not_yet_valid_worker(ca, plane):
    met = await meet(plane.server_context(), lenient_client(ca.forge("w", [WORKER_URI], [CLIENT_AUTH], start=0.5)))
    assert re.match(
        r"the certificate of W \(spiffe://.*/w\) is not valid before \d{4}-.* UTC; check the clocks",
        explain(met.server, "W"),
    )


async def test_not_the_dates_of_the_certificate_but_of_a_ca_above_it(ca, plane, tmp_path):
    root, _, _, _ = with_intermediate(ca, tmp_path / "chain")
    bundle, chain = tmp_path / "bundle.pem", tmp_path / "leaf-chain.pem"
    bundle.write_bytes(plane.ca.read_bytes() + root.read_bytes())
    issuer = TLSFiles("", ca.folder / "root.pem", ca.folder / "root.key")
    old = ca.forge("old", [], [], hosts=(), ca=True, end=-0.5, issuer=issuer)
    leaf = ca.forge("leaf", [WORKER_URI], [CLIENT_AUTH], issuer=old)
    chain.write_bytes(leaf.cert.read_bytes() + old.cert.read_bytes())
    server = TLSFiles(bundle, plane.cert, plane.key).server_context()
    met = await meet(server, lenient_client(TLSFiles(bundle, chain, leaf.key)))
    assert explain(met.server, "W").startswith("the certificate of W expired; issue a new one")


@pytest.mark.parametrize(
    ("uris", "name", "called"), [([], "plain", "CN=plain"), (["x:\n" + "y" * 999], "odd", "'x:\\\\ny{297}'")]
)
async def test_an_expired_certificate_without_an_identity(ca, plane, uris, name, called):
    files = ca.forge(name, uris, [CLIENT_AUTH], hosts=(), end=-0.5)
    met = await meet(plane.server_context(), lenient_client(files))
    assert re.match(rf"the certificate of W \({called}\) expired on ", explain(met.server, "W"))


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
