"""Certificates that are renewed under a running endpoint."""

import math
import os
import re
import shutil
import ssl
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

import konnektor as kk
from konnektor import pki
from konnektor.reloading import ReloadingContext
from tests.endpoints.parts import Certificates, connect_head, connection, tunnel, until
from tests.session.tls_parts import CLIENT_AUTH, WORKER_URI, Issuer, with_intermediate


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


def warnings(log):
    return [line for line in log() if "issue a new one" in line]


@pytest.mark.parametrize(
    ("start", "end", "warned"),
    [(-336, 29, True), (-334, 31, False), (-62, 31, False), (-62, 29, True), (-41, 19, True), (-39, 21, False)],
)
def test_a_warning_before_the_certificate_expires(tmp_path, log, start, end, warned):
    """Thirty days ahead, or a third of the life of a short one."""
    ca = Issuer(tmp_path / "pki")
    files = ca.forge("w", [WORKER_URI], [CLIENT_AUTH], start=start, end=end)
    context = following(files)
    assert len(warnings(log)) == warned
    if warned:
        day = datetime.now(UTC) + timedelta(days=end)
        assert re.fullmatch(
            rf"certificate file {files.cert} expires on {day:%Y-%m}-\d\d \d\d:\d\d UTC; issue a new one", log()[0]
        )
        os.utime(files.cert, (1, 1))
        _ = context.get()
        assert log()[1:] == ["loaded the certificate of renewed again", log()[0]]


def test_an_intermediate_may_expire_first(tmp_path, log):
    ca = Issuer(tmp_path / "pki")
    root, *_ = with_intermediate(ca, tmp_path / "chain")
    issuer = kk.TLSFiles("", ca.folder / "root.pem", ca.folder / "root.key")
    middle = ca.forge("aging", [], [], hosts=(), ca=True, start=-99, end=1, issuer=issuer)
    leaf = ca.forge("leaf", [WORKER_URI], [CLIENT_AUTH], end=300, issuer=middle)
    chain = tmp_path / "chain.pem"
    chain.write_bytes(leaf.cert.read_bytes() + middle.cert.read_bytes())
    _ = following(kk.TLSFiles(root, chain, leaf.key))
    assert len(warnings(log)) == 1


class Days:
    """An event loop whose timers are rung by hand."""

    def __init__(self, monkeypatch):
        self.timers = []
        monkeypatch.setattr("konnektor.reloading.asyncio.get_running_loop", lambda: self)

    def call_later(self, delay, callback):
        timer = SimpleNamespace(delay=delay, callback=callback, cancel=lambda: self.timers.remove(timer))
        self.timers.append(timer)
        return timer

    def ring(self):
        (timer,) = self.timers
        self.timers.clear()
        timer.callback()
        return timer.delay


def test_a_warning_each_day_until_it_is_renewed(certs, files, tmp_path, log, monkeypatch):
    ca = Issuer(tmp_path / "pki")
    aging = ca.forge("w", [WORKER_URI], [CLIENT_AUTH], start=-300, end=9)
    for source, copy in ((aging.ca, files.ca), (aging.cert, files.cert), (aging.key, files.key)):
        shutil.copy(source, copy)
    context, days = following(files), Days(monkeypatch)
    context.watch()
    for count in (2, 3):
        assert days.ring() == 86_400 and len(warnings(log)) == count
    shutil.copy(certs.ca, files.ca)
    issue_again(certs, files, tmp_path)
    before = len(log())
    assert days.ring() == 86_400  # and nobody needed to connect
    assert log()[before:] == ["loaded the certificate of renewed again"]
    context.stop()
    assert not days.timers


def test_a_certificate_of_a_few_hours_is_warned_of_within_them(tmp_path, log, monkeypatch):
    ca = Issuer(tmp_path / "pki")
    context = following(ca.forge("w", [WORKER_URI], [CLIENT_AUTH], start=-0.125, end=0.375))  # of twelve
    days = Days(monkeypatch)
    context.watch()
    assert 4 * 3600 < days.timers[0].delay <= 5 * 3600 and not warnings(log)
    context._warned_from -= timedelta(hours=5)  # which are over
    _ = days.ring()
    assert len(warnings(log)) == 1 and days.timers[0].delay == 86_400
    context._ends -= timedelta(hours=9)
    _ = days.ring()
    assert " expired on " in log()[-1]


async def test_endpoints_watch_their_certificates_while_they_run(certs):
    async with tunnel(certs) as t:
        own = certs.plane
        await t.plane.add_frontend(f"https://127.0.0.1:0?cert={own.cert}&key={own.key}&client-ca={own.ca}")
        contexts = [t.plane._context, t.worker._context, *t.plane._clients._contexts]
        assert len(contexts) == 3 and all(context._timer is not None for context in contexts)
    assert all(context._timer is None for context in contexts)


@pytest.fixture
def replaced(files):
    """A context that follows a file, whose next one fails as ``faults`` says, time after time."""
    faults, built = [], []

    def build():
        built.append(faults.pop(0) if faults else None)
        if built[-1]:
            raise kk.CertificateError(built[-1])
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    context = ReloadingContext(build, files.cert, owner="renewed")
    os.utime(files.cert, (1, 1))
    return SimpleNamespace(context=context, path=files.cert, faults=faults, built=built)


def test_files_that_cannot_be_used_for_a_while(replaced, log, monkeypatch):
    """Not valid yet by this clock, or no descriptor left to read them: nothing about the files changes afterwards."""
    monkeypatch.setattr("konnektor.reloading.RETRY", 0)
    get = replaced.context.get
    kept = replaced.context._context
    replaced.faults += [
        "not valid yet (now 1)",
        "not valid yet (now 2)",
        "too many open files",
        "not valid yet (now 3)",
    ]
    assert {get() for _ in range(4)} == {kept}
    renewed = get()
    assert renewed is not kept and get() is renewed
    assert log() == [
        "keeping the certificate that was loaded before: not valid yet (now 1)",
        "keeping the certificate that was loaded before: too many open files",
        "loaded the certificate of renewed again",
    ]


def test_files_that_cannot_be_used_are_not_tried_for_each_connection(replaced, log, monkeypatch):
    monkeypatch.setattr("konnektor.reloading.RETRY", math.inf)
    replaced.faults += ["rubbish", "rubbish"]
    for _ in range(3):
        replaced.context.get()
    assert replaced.built == [None, "rubbish"]
    os.utime(replaced.path, (2, 2))
    replaced.context.get()
    assert replaced.built == [None, "rubbish", "rubbish"] and len(log()) == 2  # these are other files
    os.utime(replaced.path, (3, 3))
    replaced.context.get()
    assert log()[-1] == "loaded the certificate of renewed again"


def test_what_only_chmod_changed(certs, files):
    context = following(files)
    first = context.get()
    before = files.key.stat().st_ctime_ns
    while files.key.stat().st_ctime_ns == before:  # the kernel's clock may tick every few milliseconds only
        files.key.chmod(0o600)
    assert context.get() is not first


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
