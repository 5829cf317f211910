"""``konnektor demo``, small: every step works, a failing one is named, and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_tool("curl")

DEMO = [sys.executable, "-W", "error", "-m", "konnektor", "demo"]


@pytest.fixture
def temporary(tmp_path):
    """Where the demonstration keeps its files; short, because a Unix socket is among them."""
    folder = tmp_path / "t"
    folder.mkdir()
    return folder


def environment(temporary, **more):
    # Settings of curl's that would lead it elsewhere must not matter.
    hostile = {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "*", "CURL_HOME": str(temporary)}
    return {**os.environ, "TMPDIR": str(temporary), **hostile, **more}


def processes_of(temporary):
    """Processes that were told of a file in the demonstration's folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(file.read_bytes())
    return [line for line in found if f"{temporary}/konnektor-demo-".encode() in line]


def test_every_step_works(temporary):
    done = subprocess.run(
        [*DEMO, "--size", "8MiB"], env=environment(temporary), capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    table = done.stdout.partition("how much")[2]
    rows = [line for line in table.splitlines()[2:] if line][:-1]
    assert len(rows) == 11 and all(row.endswith(" ok") for row in rows)
    assert "client: HTTP/1.1 403 Destination Denied by Policy" in done.stdout
    assert "169.254.169.254:80, a link-local address" in done.stdout
    assert list(temporary.iterdir()) == [] and processes_of(temporary) == []


def test_a_failing_step_is_named(temporary, tmp_path):
    # A curl that fails stands for whatever may go wrong.
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "curl").write_text("#!/bin/sh\necho 'curl: (7) no luck today' >&2\nexit 7\n")
    (fake / "curl").chmod(0o755)
    env = environment(temporary, PATH=f"{fake}:{os.environ['PATH']}")
    done = subprocess.run(DEMO, env=env, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "\nfailed: curl, CONNECT on TCP: curl http://127.0.0.1.node-1.konnektor.internal:" in done.stdout
    assert "no luck today" in done.stdout
    assert "the log of the control plane ends:" in done.stdout and "the log of the worker ends:" in done.stdout
    assert list(temporary.iterdir()) == [] and processes_of(temporary) == []


def test_a_defect_is_where_its_step_is(temporary):
    script = "from konnektor.demo import tour; tour.Tour._curl_tcp = lambda self: 1 / 0; tour.run_demo(1)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(temporary), capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    (row,) = [line for line in done.stdout.partition("how much")[2].splitlines() if "curl, CONNECT on TCP" in line]
    assert row.endswith(" FAILED")
    assert list(temporary.iterdir()) == [] and processes_of(temporary) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(temporary, number):
    command = [*DEMO, "--size", "64GiB"]
    with subprocess.Popen(
        command, env=environment(temporary), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        try:
            for line in demo.stdout:
                if "streams at once" in line:
                    break
            demo.send_signal(number)
            _, errors = demo.communicate(timeout=30)
        finally:
            demo.kill()
    assert (demo.returncode, errors) == (130, "\ninterrupted: everything is stopped and removed\n")
    assert list(temporary.iterdir()) == [] and processes_of(temporary) == []


def test_without_curl_it_says_so(temporary):
    env = environment(temporary, PATH="/nowhere")
    done = subprocess.run(DEMO, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "curl is missing: please install it.\n")
