"""Both endpoints as processes of their own, used by programs that know nothing of konnektor."""

import contextlib
import http.server
import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.endpoints.parts import ESTABLISHED, Process, connect_head, flags, unused_port
from tests.tools import needs

BODY = bytes(range(256)) * 4096


@pytest.fixture
def start(tmp_path):
    """Starts an endpoint, which is gone at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **kwargs: stack.enter_context(
            Process(tmp_path / f"{len(list(tmp_path.iterdir()))}.log", *arguments, **kwargs)
        )


@pytest.fixture
def plane(start, certs):
    def plane(*arguments, listen="127.0.0.1:0", **kwargs):
        process = start("control-plane", "--listen", listen, *flags(certs.plane), *arguments, **kwargs)
        process.where = process.ready()
        return process

    return plane


@pytest.fixture
def worker(start, certs):
    def worker(plane, *arguments, allow="127.0.0.1:*", wait=True, name="node-1", **kwargs):
        connect = plane.where["tunnel"][0]
        identity = flags(certs.worker(name))
        process = start("worker", "--connect", connect, "--allow", allow, *identity, *arguments, **kwargs)
        if wait:
            assert process.ready() == {"worker": [name], "connected": [connect]}
        return process

    return worker


class Pages(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        body = BODY if self.path == "/big" else b"hello\n"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    """An HTTP server in this process; its port."""
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)) as server:
        yield server.server_port


@contextlib.contextmanager
def serving(server):
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def output(*command, **kwargs):
    return subprocess.run(command, capture_output=True, check=True, timeout=50, **kwargs).stdout


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


def forwarded(plane):
    return address(plane.where["forward"][0].partition("->")[0])


# Programs


def test_curl_through_the_http_frontend(plane, worker, web):
    curl = needs("curl")
    control_plane = plane("--frontend", "http://127.0.0.1:0", "--grant-route", "node-1=default")
    node = worker(control_plane, "--route", "default")
    proxy = ["--proxytunnel", "--proxy", "http://" + control_plane.where["http"][0]]
    url = f"http://127.0.0.1:{web}/"
    assert output(curl, "-sS", *proxy, url) == b"hello\n"
    assert output(curl, "-sS", *proxy, url + "big") == BODY
    by_header = ["--proxy-header", "Konnektor-Worker: node-1"]
    assert output(curl, "-sS", *proxy, *by_header, url) == b"hello\n"
    refused = subprocess.run([curl, "-sSv", *proxy, f"http://127.0.0.1:{unused_port()}/"], capture_output=True)
    assert refused.returncode == 56 and b"502 Connection Refused by Target" in refused.stderr
    for process in (node, control_plane):
        process.stop()
    lines = control_plane.log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING) konnektor\.", line) for line in lines)
    assert any("worker node-1 connected from" in line for line in lines)
    assert any("worker node-1 at" in line and "disconnected" in line for line in lines)


def test_curl_through_the_https_frontend(plane, worker, web, certs):
    curl = needs("curl")
    own, client = certs.plane, certs("client", "apiserver")
    control_plane = plane("--frontend", f"https://127.0.0.1:0?cert={own.cert}&key={own.key}&client-ca={own.ca}")
    worker(control_plane)
    got = output(
        curl, "-sS", "--proxytunnel", "--proxy", "https://" + control_plane.where["https"][0],
        "--proxy-cacert", own.ca, "--proxy-cert", client.cert, "--proxy-key", client.key,
        "--proxy-header", "Konnektor-Worker: node-1", f"http://127.0.0.1:{web}/big",
    )  # fmt: skip
    assert got == BODY


def test_socat_through_the_unix_socket(plane, worker, web, tmp_path):
    socat = needs("socat")
    control_plane = plane("--frontend", f"http+unix://{tmp_path}/c.sock")
    assert control_plane.where["unix"] == [f"{tmp_path}/c.sock"]
    worker(control_plane)
    request = connect_head(f"127.0.0.1.node-1.konnektor.internal:{web}") + b"GET / HTTP/1.0\r\n\r\n"
    with subprocess.Popen(
        [socat, "-", f"UNIX-CONNECT:{tmp_path}/c.sock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdin.write(request)
        process.stdin.flush()
        answer = process.stdout.read()
    assert answer.startswith(ESTABLISHED) and answer.endswith(b"hello\n")
    control_plane.stop()
    assert not (tmp_path / "c.sock").exists()


def test_openssl_s_client(plane, worker, certs):
    openssl = needs("openssl")
    files = certs.plane
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        control_plane = plane("--frontend", "http://127.0.0.1:0", "--grant-route", "node-1=default")
        worker(control_plane, "--route", "default")
        # Its status is 1: Python's server ends without close_notify.
        got = subprocess.run(
            [openssl, "s_client", "-quiet", "-verify_return_error", "-CAfile", files.ca,
             "-proxy", control_plane.where["http"][0], "-connect", f"127.0.0.1:{server.server_port}"],
            input=b"GET / HTTP/1.0\r\n\r\n", capture_output=True, timeout=50,
        )  # fmt: skip
    assert got.stdout.endswith(b"hello\n") and b"verify return:1" in got.stderr


@pytest.mark.parametrize("direction", [[], ["--reverse"]])
def test_iperf3_through_a_forward(plane, worker, direction):
    iperf3 = needs("iperf3")
    port = unused_port()
    command = [iperf3, "-s", "-1", "--forceflush", "-B", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert select.select([server.stdout], [], [], 20)[0]  # it is there
        control_plane = plane("--forward", f"127.0.0.1:0=node-1/127.0.0.1:{port}")
        worker(control_plane)
        host, local = forwarded(control_plane)
        # More than all pools and sockets on the way can hold: an end of the
        # test that overtakes the bulk, as a small message may, ends nothing
        # before the server has received.
        args = ["-c", host, "-p", str(local), "-P", "8", "-n", "256M", "-J", *direction]
        report = json.loads(output(iperf3, *args))
        server.communicate()
    assert "error" not in report and report["end"]["sum_received"]["bytes"]


def test_wrk_through_a_forward(plane, worker, web):
    wrk = needs("wrk")
    control_plane = plane("--forward", f"127.0.0.1:0=node-1/127.0.0.1:{web}")
    worker(control_plane)
    host, port = forwarded(control_plane)
    text = output(wrk, "-t", "1", "-c", "16", "-d", "1", f"http://{host}:{port}/").decode()
    assert int(re.search(r"(\d+) requests in", text)[1]) > 16
    assert "Socket errors" not in text and "Non-2xx" not in text


# Signals and ends


class Held:
    """A client with a tunnel to a server of its own, both at rest."""

    def __init__(self, plane):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.client = socket.create_connection(address(plane.where["http"][0]))
        to = f"127.0.0.1.node-1.konnektor.internal:{self.server.getsockname()[1]}"
        self.client.sendall(connect_head(to))
        self.target, _ = self.server.accept()
        assert self.client.recv(100) == ESTABLISHED

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in (self.server, self.client, self.target):
            sock.close()


def reset_by_peer(sock):
    try:
        return sock.recv(1) and False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("which", ["worker", "control-plane"])
def test_a_signal_drains_and_the_grace_resets(plane, worker, number, which):
    control_plane = plane("--frontend", "http://127.0.0.1:0", "--grace", "300ms")
    node = worker(control_plane, "--grace", "300ms")
    leaving = node if which == "worker" else control_plane
    with Held(control_plane) as held:
        leaving.signal(number)
        held.client.sendall(b"still")
        assert held.target.recv(100) == b"still"
        assert reset_by_peer(held.client) and reset_by_peer(held.target)
        assert leaving.wait() == 0
    told = leaving.log.read_text()
    assert f"{number.name}: draining for up to 0.3 s; once more aborts" in told
    assert "the grace is over: cut off 1 stream with " in told


def test_a_drain_ends_with_its_last_stream(plane, worker):
    control_plane = plane("--frontend", "http://127.0.0.1:0")
    node = worker(control_plane)
    with Held(control_plane) as held:
        node.signal()
        held.client.sendall(b"last")
        held.client.shutdown(socket.SHUT_WR)
        assert held.target.makefile("rb").read() == b"last"
        held.target.close()
        assert node.wait() == 0


@pytest.mark.parametrize("which", ["worker", "control-plane"])
def test_a_second_signal_aborts(plane, worker, which):
    control_plane = plane("--frontend", "http://127.0.0.1:0")
    node = worker(control_plane)
    leaving = node if which == "worker" else control_plane
    with Held(control_plane) as held:
        leaving.signal()
        wait_for_line(leaving, "draining for up to 25 s")
        leaving.signal()
        assert leaving.wait() == 130
        assert reset_by_peer(held.client) or which == "worker"


@pytest.mark.parametrize("which", ["worker", "control-plane"])
def test_a_hangup_ends_no_endpoint(plane, worker, web, which):
    control_plane = plane("--forward", f"127.0.0.1:0=node-1/127.0.0.1:{web}")
    node = worker(control_plane)
    hung = node if which == "worker" else control_plane
    hung.signal(signal.SIGHUP)
    wait_for_line(hung, "SIGHUP: going on")
    with socket.create_connection(forwarded(control_plane)) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.makefile("rb").read().endswith(b"hello\n")
    for process in (node, control_plane):
        process.stop()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams(certs, closed):
    """Their descriptors went to the event loop, whose end then was an assertion of libuv's."""
    port = unused_port()
    arguments = ["-m", "konnektor", "control-plane", "--listen", f"127.0.0.1:{port}", *flags(certs.plane)]
    command = 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed)
    process = subprocess.Popen(["sh", "-c", command, "sh", sys.executable, *arguments])
    try:
        while True:  # bounded by the test's timeout
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        for number in closed:
            assert Path(f"/proc/{process.pid}/fd/{number}").samefile(os.devnull)
        process.terminate()
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def wait_for_line(process, text):
    """Bounded by the test's timeout."""
    while text not in process.log.read_text():
        time.sleep(0.01)


def test_the_control_plane_dies_while_the_worker_drains(plane, worker):
    control_plane = plane("--frontend", "http://127.0.0.1:0")
    node = worker(control_plane, "--resume-grace", "1s")
    with Held(control_plane):
        node.signal()
        wait_for_line(node, "draining")
        control_plane.signal(signal.SIGKILL)
        assert node.wait() == 0


def test_a_worker_waits_for_its_control_plane(start, plane, certs):
    where = f"127.0.0.1:{unused_port()}"
    node = start("worker", "--connect", where, "--allow", "127.0.0.1:*", *flags(certs.worker()))
    wait_for_line(node, "connection refused; start it, or check the port; trying again in")
    first = plane(listen=where)
    assert node.ready() == {"worker": ["node-1"], "connected": [where]}
    first.signal(signal.SIGKILL)
    wait_for_line(node, "cannot resume the session: ")
    second = plane(listen=where)
    wait_for_line(second, "worker node-1 connected from")
    wait_for_line(node, "no longer knows the session; starting afresh")
    node.stop()
    second.stop()


def test_a_worker_that_is_stopped_while_it_waits(start, certs):
    where = f"127.0.0.1:{unused_port()}"
    node = start("worker", "--connect", where, "--allow", "127.0.0.1:*", *flags(certs.worker()))
    wait_for_line(node, "trying again in")
    node.stop()


def test_once(plane, worker):
    control_plane = plane()
    node = worker(control_plane, "--once")
    control_plane.stop()
    assert node.wait() == 0
    control_plane = plane()
    node = worker(control_plane, "--once", "--resume-grace", "0")
    control_plane.signal(signal.SIGKILL)
    assert node.wait() == 5
    last = node.log.read_text().splitlines()[-1]
    assert re.fullmatch(r"konnektor: the session with 127\.0\.0\.1:\d+ broke: connection .*", last)


def test_a_worker_is_killed_before_it_has_dialed(plane, worker, web):
    """Its session could be resumed, so its clients wait 2 s for that."""
    control_plane = plane("--frontend", "http://127.0.0.1:0")
    node = worker(control_plane)
    node.signal(signal.SIGSTOP)
    with socket.create_connection(address(control_plane.where["http"][0])) as client:
        client.sendall(connect_head(f"127.0.0.1.node-1.konnektor.internal:{web}"))
        node.signal(signal.SIGKILL)
        client.settimeout(30)
        assert client.recv(100).startswith(b"HTTP/1.1 502 Target Unreachable\r\n")


def test_a_second_worker_of_the_same_name(plane, worker):
    control_plane = plane()
    worker(control_plane)
    second = worker(control_plane, "--once", wait=False)
    assert second.wait() == 5
    where = control_plane.where["tunnel"][0]
    assert second.log.read_text() == (
        f"konnektor: the control plane at {where} refused us: another process is connected as node-1\n"
    )
    assert re.search(
        r"WARNING konnektor\.control_plane: refused worker node-1 at 127\.0\.0\.1:\d+: "
        r"another process of that name is connected from 127\.0\.0\.1:\d+\n",
        control_plane.log.read_text(),
    )


# Descriptors


def connect_status(where, to):
    with socket.create_connection(address(where)) as sock:
        sock.sendall(connect_head(to))
        return sock.makefile("rb").readline()


def test_a_worker_out_of_descriptors_refuses(plane, worker, web):
    control_plane = plane("--frontend", "http://127.0.0.1:0")
    worker(control_plane, descriptors=40)
    to = f"127.0.0.1.node-1.konnektor.internal:{web}"
    answers = []
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            sock = stack.enter_context(socket.create_connection(address(control_plane.where["http"][0])))
            sock.sendall(connect_head(to))
            answers.append(sock.recv(1000))
        assert answers[0] == ESTABLISHED and answers[-1].startswith(b"HTTP/1.1 503 Limit Reached\r\n")
    # What was open ends, and it serves again.
    while connect_status(control_plane.where["http"][0], to) != b"HTTP/1.1 200 Connection Established\r\n":
        time.sleep(0.01)
    assert 10 < answers.count(ESTABLISHED) < 40


@pytest.mark.parametrize("kind", ["frontend", "forward"])
def test_clients_leave_descriptors_to_workers(plane, worker, web, kind):
    flag = f"127.0.0.1:0=node-1/127.0.0.1:{web}" if kind == "forward" else "http://127.0.0.1:0"
    control_plane = plane("--frontend", "http://127.0.0.1:0", f"--{kind}", flag, descriptors=80)
    worker(control_plane)
    where = control_plane.where["http" if kind == "frontend" else kind][-1].partition("->")[0]
    with contextlib.ExitStack() as stack:
        for _ in range(90):
            sock = stack.enter_context(socket.create_connection(address(where)))
            if kind == "frontend":
                sock.sendall(connect_head(f"127.0.0.1.node-1.konnektor.internal:{web}"))
        wait_for_line(
            control_plane,
            f"cannot accept on {where}: the last descriptors are kept for workers; raise the limit of open files",
        )
        worker(control_plane, name="node-2")
    # What was open ends, and it serves again.
    answer = b""
    while answer != b"HTTP/1.1 200 Connection Established\r\n":
        with contextlib.suppress(ConnectionError):
            answer = connect_status(control_plane.where["http"][0], f"127.0.0.1.node-1.konnektor.internal:{web}")
    assert control_plane.log.read_text().count("cannot accept") < 5
    control_plane.stop()
