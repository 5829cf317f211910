"""Certificates that are renewed under a running endpoint."""

import shutil

import pytest

import konnektor as kk
from konnektor import pki
from konnektor.reloading import ReloadingContext
from tests.endpoints.parts import tunnel, until


@pytest.fixture
def files(tmp_path, certs):
    """Copies of a worker's files, to be replaced."""
    own = certs.worker("renewed")
    for source, name in ((own.ca, "ca.pem"), (own.cert, "w.pem"), (own.key, "w.key")):
        shutil.copy(source, tmp_path / name)
    return kk.TLSFiles(tmp_path / "ca.pem", tmp_path / "w.pem", tmp_path / "w.key")


def issue_again(certs, files, tmp_path, name="renewed"):
    folder = tmp_path / "again"
    folder.mkdir(exist_ok=True)
    for file in ("ca.pem", "ca.key"):
        shutil.copy(certs.folder / file, folder / file)
    issued = pki.issue(folder, "worker", name)
    issued.cert.rename(files.cert)
    issued.key.rename(files.key)


def test_renewed_files_are_used(certs, files, tmp_path, log):
    context = ReloadingContext(files, files.client_context)
    first = context.get()
    assert context.get() is first
    issue_again(certs, files, tmp_path)
    second = context.get()
    assert second is not first and context.get() is second
    assert log() == ["loaded the certificate of renewed again"]


def test_a_key_log_that_cannot_be_written_any_more(certs, files, tmp_path, log, monkeypatch):
    context = ReloadingContext(files, files.client_context)
    first = context.get()
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "no" / "keys"))
    issue_again(certs, files, tmp_path)
    assert context.get() is first and context.get() is first
    assert [line.partition(": ")[0] for line in log()] == ["keeping the certificate that was loaded before"]


def test_files_that_went_bad_are_told_once(certs, files, tmp_path, log):
    context = ReloadingContext(files, files.client_context)
    first = context.get()
    files.key.unlink()
    assert context.get() is first and context.get() is first
    files.key.write_text("rubbish")
    assert context.get() is first
    issue_again(certs, files, tmp_path, name="somebody-else")
    assert context.get() is first
    lines = log()
    assert (
        all(line.startswith("keeping the certificate that was loaded before: ") for line in lines) and len(lines) == 3
    )
    assert (
        "now names spiffe://konnektor.local/worker/somebody-else, not spiffe://konnektor.local/worker/renewed"
        in lines[2]
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
