"""The examples run as they are: as scripts, with warnings as errors, over real certificates and sockets."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from konnektor.testing import certificates

EXAMPLES = Path(__file__).parents[2] / "examples"
PYTHON = [sys.executable, "-W", "error"]  # not "-X dev": asyncio's debug mode would tell on stderr of a slow machine
WITHIN = 20


class Running:
    """An example that goes on until Ctrl-C; its output line by line."""

    def __init__(self, script, *arguments):
        self.process = subprocess.Popen(
            [*PYTHON, EXAMPLES / script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._lines = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def line(self):
        try:
            return self._lines.get(timeout=WITHIN)
        except Empty:
            self.process.kill()
            pytest.fail(f"no line within {WITHIN} s; standard error: {self.process.stderr.read()}")

    def interrupt(self):
        """Ctrl-C. The example ends well, and has nothing to complain about."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(WITHIN) == 0, self.process.stderr.read()
        assert self.process.stderr.read() == ""

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(WITHIN)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def start():
    running = []

    def begin(script, *arguments):
        running.append(Running(script, *arguments))
        return running[-1]

    yield begin
    for example in running:
        example.close()


@pytest.fixture
def pki(tmp_path):
    return certificates(tmp_path / "pki", "node-1", "node-2").ca.parent


@pytest.fixture
def web():
    """An HTTP server behind the workers; returns its port."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"page for {self.headers['Host']}\n".encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(address, host):
    """Status and body of a page, without the proxy that the environment may name."""
    opener = build_opener(ProxyHandler({}))
    with contextlib.closing(opener.open(Request(f"http://{address}/", headers={"Host": host}), timeout=WITHIN)) as page:
        return page.status, page.read().decode()


@pytest.mark.parametrize(
    ("script", "output"),
    [
        ("quickstart.py", ["HELLO, WORLD", "ONE LINE", "refused: only port 7 here", "round trip below a second: True"]),
        ("custom_stream.py", ["THROUGH THE TUNNEL", "4", "refused: no such command here"]),
    ],
)
def test_examples_that_end_by_themselves(script, output, tmp_path):
    done = subprocess.run(
        [*PYTHON, EXAMPLES / script], cwd=tmp_path, capture_output=True, text=True, timeout=WITHIN, check=False
    )
    # Where a command is killed in the moment in which it ends, asyncio may reap it twice, and says so.
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("Unknown child process pid")]
    assert (done.returncode, complaints) == (0, [])
    assert done.stdout.splitlines() == output


def test_control_plane_and_worker(start, pki, web):
    control_plane = start("control_plane.py", pki, "127.0.0.1:0", f"127.0.0.1:{web}")
    address = control_plane.line().removeprefix("listening on ")
    worker = start("worker.py", pki, "node-1", address, "--allow", f"127.0.0.1:{web}")
    assert worker.line().startswith("node-1 connected to cp, round trip ")
    assert control_plane.line() == "node-1 connected"
    assert control_plane.line() == f"127.0.0.1:{web} by node-1: HTTP/1.0 200 OK"
    denied = start("worker.py", pki, "node-2", address, "--allow", "10.0.0.0/8:*")
    assert denied.line().startswith("node-2 connected")
    assert control_plane.line() == "node-2 connected"
    assert control_plane.line() == f"127.0.0.1:{web} by node-2: denied"
    worker.interrupt()
    assert control_plane.line() == "node-1 disconnected"
    control_plane.interrupt()


def test_embed_proxy(start, pki, web):
    proxy = start("embed_proxy.py", pki, "127.0.0.1:0", "127.0.0.1:0", web)
    _, tunnel, _, http = proxy.line().split()
    worker = start("worker.py", pki, "node-1", tunnel, "--allow", f"127.0.0.1:{web}")
    worker.line()
    assert get(http, "node-1.nodes.example") == (200, "page for node-1.nodes.example\n")
    for host in ("node-2.nodes.example", "elsewhere.example"):
        with pytest.raises(HTTPError, match="502") as error:
            get(http, host)
        error.value.close()
    worker.interrupt()
    proxy.interrupt()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("control_plane.py", ["TAKEN", "127.0.0.1:1"]),
        ("embed_proxy.py", ["TAKEN", "127.0.0.1:0", "1"]),
        ("embed_proxy.py", ["127.0.0.1:0", "TAKEN", "1"]),
    ],
)
def test_an_example_whose_port_is_in_use_says_so(script, arguments, pki):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = "127.0.0.1:{1}".format(*taken.getsockname())
        command = [*PYTHON, EXAMPLES / script, pki, *(where if word == "TAKEN" else word for word in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1), done.stderr
    assert done.stderr.startswith(f"{script}: cannot listen on {where}: ")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("control_plane.py", ["127.0.0.1:0", "127.0.0.1:1"]),
        ("embed_proxy.py", ["127.0.0.1:0", "127.0.0.1:0", "1"]),
        ("worker.py", ["node-1", "127.0.0.1:1", "--allow", "127.0.0.1:1"]),
    ],
)
def test_an_example_whose_files_are_missing_says_so(script, arguments, tmp_path):
    command = [*PYTHON, EXAMPLES / script, tmp_path / "none", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert re.match(rf"{script}: (CA|certificate) file {tmp_path}/none/\S+ does not exist", done.stderr)


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_are_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 80
