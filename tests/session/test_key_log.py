"""SSLKEYLOGFILE: secrets of real connections, in a file of its owner's alone."""

from types import SimpleNamespace

import pytest

from konnektor.errors import ConfigurationError
from konnektor.tls import frontend_context
from tests.session.tls_parts import meet


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
