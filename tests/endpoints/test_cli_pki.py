"""``konnektor pki``: what it prints where, and what it lets through to the one place that sets exit statuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from konnektor.cli.pki import pki
from konnektor.errors import CertificateError, ConfigurationError
from konnektor.tls import TLSFiles


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(pki, [str(argument) for argument in arguments])


def test_from_nothing_to_usable_files(tmp_path, run):
    folder = tmp_path / "new" / "pki"
    made = run("init", "--dir", folder, "--trust-domain", "t.example")
    assert made.exit_code == 0 and made.stdout.splitlines() == [f"{folder}/ca.pem", f"{folder}/ca.key"]
    plane = run("issue", "--dir", folder, "--role", "control-plane", "--name", "cp", "--san", "a", "--san", "192.0.2.1")
    assert plane.exit_code == 0 and plane.stdout.splitlines() == [f"{folder}/cp.pem", f"{folder}/cp.key"]
    assert plane.stderr.startswith("next: konnektor control-plane --listen")
    worker = run("issue", "--dir", folder, "--role", "worker", "--name", "node-1", "--days", "9999")
    assert worker.exit_code == 0 and worker.stdout.splitlines() == [f"{folder}/node-1.pem", f"{folder}/node-1.key"]
    assert "note: it expires on" in worker.stderr and "next: konnektor worker --connect" in worker.stderr
    client = run("issue", "--dir", folder, "--role", "client", "--name", "apiserver")
    assert client.exit_code == 0 and client.stderr == ""
    TLSFiles(folder / "ca.pem", folder / "cp.pem", folder / "cp.key").server_context()
    node = TLSFiles(folder / "ca.pem", folder / "node-1.pem", folder / "node-1.key")
    node.client_context()
    assert str(node.identity()) == "spiffe://t.example/worker/node-1"


def test_written_elsewhere(tmp_path, run):
    assert run("init", "--dir", tmp_path / "ca").exit_code == 0
    made = run("issue", "--dir", tmp_path / "ca", "--role", "worker", "--name", "w", "--out", tmp_path / "new")
    assert made.exit_code == 0 and made.stdout.splitlines() == [f"{tmp_path}/new/w.pem", f"{tmp_path}/new/w.key"]
    assert f"--ca {tmp_path}/ca/ca.pem --cert {tmp_path}/new/w.pem --key {tmp_path}/new/w.key" in made.stderr
    TLSFiles(tmp_path / "ca" / "ca.pem", tmp_path / "new" / "w.pem", tmp_path / "new" / "w.key").client_context()


def test_errors_reach_the_caller(tmp_path, run):
    issue = ("issue", "--dir", tmp_path, "--role", "worker", "--name", "w")
    assert isinstance(run(*issue).exception, CertificateError)  # no CA yet
    assert run("init", "--dir", tmp_path).exit_code == 0
    assert isinstance(run("init", "--dir", tmp_path).exception, ConfigurationError)
    assert run(*issue).exit_code == 0
    assert isinstance(run(*issue).exception, ConfigurationError)
    assert isinstance(run(*issue[:-1], "Bad Name").exception, ConfigurationError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(tmp_path, unbuffered):
    """The files are made then, and one sentence says so: also where Python would try once more when it exits."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "konnektor", "pki", "init", "--dir", tmp_path],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert done.returncode == 2 and done.stderr.decode() == (
        f"konnektor: {tmp_path}/ca.pem and {tmp_path}/ca.key are made, but standard output cannot be written: "
        "No space left on device\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "ca.key"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("init",),
        ("init", "--dir", "x", "--days", "many"),
        ("issue", "--dir", "x", "--role", "admin", "--name", "a"),
        ("issue", "--dir", "x", "--role", "worker"),
    ],
)
def test_usage_errors_are_status_2(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and "Error: " in result.stderr


@pytest.mark.parametrize(("command", "flags"), [("init", 3), ("issue", 6)])
def test_every_flag_has_an_example(run, command, flags):
    assert run(command, "--help").stdout.count("E.g.") == flags
    assert "  konnektor pki issue --dir pki --role worker --name node-1\n" in run("--help").stdout
