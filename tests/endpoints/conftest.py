import logging

import pytest

from tests.endpoints.parts import Certificates


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """Of a CA that nobody trusts."""
    return Certificates(tmp_path_factory.mktemp("foreign"))


@pytest.fixture
def log(caplog):
    """The messages logged so far."""
    caplog.set_level(logging.DEBUG, "konnektor")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("konnektor")]
