"""Certificates that are renewed under a running endpoint."""

import shutil
import ssl

import pytest

import konnektor as kk
from konnektor import pki
from konnektor.reloading import ReloadingContext
from tests.endpoints.parts import Certificates, connect_head, connection, tunnel, until


@pytest.fixture
def files(tmp_path, certs):
    """Copies of a worker's files, to be replaced."""
    own = certs.worker("renewed")
    for source, name in ((own.ca, "ca.pem"), (own.cert, "w.pem"), (own.key, "w.key")):
        shutil.copy(source, tmp_path / name)
    return kk.TLSFiles(tmp_path / "ca.pem", tmp_path / "w.pem", tmp_path / "w.key")


def issue_again(certs, files, tmp_path, name="renewed", role="worker"):
    folder = tmp_path / "again"
    folder.mkdir(exist_ok=True)
    for file in ("ca.pem", "ca.key"):
        shutil.copy(certs.folder / file, folder / file)
    issued = pki.issue(folder, role, name)
    issued.cert.rename(files.cert)
    issued.key.rename(files.key)


def following(files):
    return ReloadingContext(files.client_context, files.cert, files.key, files.ca, owner="renewed")


def test_renewed_files_are_used(certs, files, tmp_path, log):
    context = following(files)
    first = context.get()
    assert context.get() is first
    issue_again(certs, files, tmp_path)
    second = context.get()
    assert second is not first and context.get() is second
    assert log() == ["loaded the certificate of renewed again"]


def test_a_key_log_that_cannot_be_written_any_more(certs, files, tmp_path, log, monkeypatch):
    context = following(files)
    first = context.get()
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "no" / "keys"))
    issue_again(certs, files, tmp_path)
    assert context.get() is first and context.get() is first
    assert [line.partition(": ")[0] for line in log()] == ["keeping the certificate that was loaded before"]


def test_files_that_went_bad_are_told_once(certs, files, tmp_path, log):
    context = following(files)
    first = context.get()
    files.key.unlink()
    assert context.get() is first and context.get() is first
    files.key.write_text("rubbish")
    assert context.get() is first
    lines = log()
    assert len(lines) == 2
    assert all(line.startswith("keeping the certificate that was loaded before: key file ") for line in lines)


async def test_an_endpoint_stays_who_it_is(certs, files, tmp_path, log):
    worker = kk.Worker(["127.0.0.1:1"], tls=files)
    first = worker._context.get()
    issue_again(certs, files, tmp_path, name="somebody-else")
    assert worker._context.get() is first and worker.identity.name == "renewed"
    (line,) = log()
    assert line == (
        "keeping the certificate that was loaded before: the certificate now names "
        "spiffe://konnektor.local/worker/somebody-else, not spiffe://konnektor.local/worker/renewed"
    )


async def test_a_session_after_a_renewal(certs, files, tmp_path):
    async with tunnel(certs) as t, kk.Worker([t.plane.address], tls=files) as worker:
        session = await t.plane.wait_for("renewed")
        serial = session.ssl_object.getpeercert()["serialNumber"]
        issue_again(certs, files, tmp_path)
        session.abort()
        await until(lambda: t.plane.get("renewed") not in (None, session))
        assert t.plane.get("renewed").ssl_object.getpeercert()["serialNumber"] != serial
        assert worker.identity.name == "renewed"


async def test_an_https_frontend_after_a_renewal(certs, tmp_path, log):
    own, client, stranger = certs.plane, certs("client", "api"), Certificates(tmp_path / "elsewhere")
    files = kk.TLSFiles(tmp_path / "client-ca.pem", tmp_path / "f.pem", tmp_path / "f.key")
    for source, copy in ((own.ca, files.ca), (own.cert, files.cert), (own.key, files.key)):
        shutil.copy(source, copy)
    context = ssl.create_default_context(cafile=own.ca)
    context.load_cert_chain(client.cert, client.key)
    where = "127.0.0.1:1"

    async def serial():
        async with connection(where, ssl=context) as (reader, writer):
            writer.write(connect_head("nowhere:1"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
            return writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]

    async with kk.ControlPlane("127.0.0.1:0", tls=own) as plane:
        url = f"https://127.0.0.1:0?cert={files.cert}&key={files.key}&client-ca={files.ca}"
        where = await plane.add_frontend(url)
        first = await serial()
        assert await serial() == first
        issue_again(certs, files, tmp_path, "front", "control-plane")
        second = await serial()
        assert second != first
        files.key.write_text("rubbish")
        assert await serial() == second
        issue_again(certs, files, tmp_path, "front-2", "control-plane")
        shutil.copy(stranger.ca, files.ca)  # of other clients from now on
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await serial()
    told = [line for line in log() if "certificate" in line]
    assert told[0] == "loaded the certificate of https://127.0.0.1:0 again"
    assert told[1].startswith(f"keeping the certificate that was loaded before: key file {files.key}")
    assert told[2] == told[0] and "was not issued by a CA that we trust" in told[3] and len(told) == 4
