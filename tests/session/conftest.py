"""Certificates that the tests of sessions share, and ends that do not take long."""

import pytest

from konnektor import driver
from tests.session.pairs import Authority
from tests.session.tls_parts import Issuer


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def short_close(monkeypatch):
    monkeypatch.setattr(driver, "CLOSE_TIMEOUT", 0.1)


@pytest.fixture
def ca(tmp_path):
    return Issuer(tmp_path / "pki")


@pytest.fixture
def foreign(tmp_path):
    return Issuer(tmp_path / "foreign")


@pytest.fixture
def plane(ca):
    return ca.issue("control-plane", "cp")


@pytest.fixture
def worker(ca):
    return ca.issue("worker", "node-1")
