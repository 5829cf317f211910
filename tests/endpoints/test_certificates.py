"""Certificates for tests of a program's own, used as such a test uses them."""

import asyncio

import pytest

import konnektor as kk
from konnektor.testing import certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("made"), "node-1", "node-2")


class Hello(kk.StreamType):
    name = "hello@test.example"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_endpoints_with_certificates_of_the_tests_own(made, host):
    async with kk.ControlPlane("127.0.0.1:0", tls=made.control_plane) as control_plane:
        address = f"{host}:{control_plane.address.rpartition(':')[2]}"
        for name in ("node-1", "node-2"):
            worker = kk.Worker([address], tls=made.workers[name])

            @worker.handle(Hello)
            async def hello(stream, _request):
                await stream.accept()
                await stream.send(f"hello {stream.session.peer_name}".encode())

            async with worker:
                session = await control_plane.wait_for(name)
                async with await session.open(Hello()) as stream:
                    assert await stream.receive() == b"hello cp"


async def test_another_set_is_not_trusted(made, tmp_path, log):
    other = certificates(tmp_path, "node-1", control_plane="plane-2")
    assert other.control_plane.identity().name == "plane-2"
    async with kk.ControlPlane("127.0.0.1:0", tls=made.control_plane) as control_plane:
        async with kk.Worker([control_plane.address], tls=other.workers["node-1"], once=True) as worker:
            with pytest.raises(kk.HandshakeError):
                async with asyncio.timeout(10):
                    await worker.wait_connected()
        assert not list(control_plane)


def test_what_is_written(tmp_path):
    made = certificates(tmp_path / "new" / "pki", "b", "a")
    assert list(made.workers) == ["b", "a"]
    assert made.ca == made.control_plane.ca == tmp_path / "new" / "pki" / "ca.pem"
    for files in (made.control_plane, *made.workers.values()):
        assert files.key.stat().st_mode & 0o777 == 0o600
    assert certificates(tmp_path / "without").workers == {}


@pytest.mark.parametrize(
    ("names", "kwargs", "text"),
    [
        (("Node_1",), {}, "cannot be a name"),
        (("node-1", "node-1"), {}, "exists already"),
        (("cp",), {}, "exists already"),
        (("node-1",), {"control_plane": "C P"}, "cannot be a name"),
    ],
)
def test_names_that_cannot_be(tmp_path, names, kwargs, text):
    with pytest.raises(kk.ConfigurationError, match=text):
        certificates(tmp_path, *names, **kwargs)


def test_a_directory_in_use(tmp_path):
    certificates(tmp_path, "node-1")
    with pytest.raises(kk.ConfigurationError, match="exists already"):
        certificates(tmp_path, "node-2")
