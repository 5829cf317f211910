"""The command line in this process: each flag, each status, and one sentence for each mistake."""

import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import click
import pytest

import konnektor as kk
from konnektor import mux
from konnektor.cli.main import cli, main
from konnektor.cli.options import Parsed, say_ready
from konnektor.policy import parse_allow
from tests.endpoints.parts import PATIENCE, Certificates, Process, flags, unused_port


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command; gives its status, standard output and standard error. A ready endpoint is stopped."""
    root = logging.getLogger()
    before, limit = (root.handlers[:], root.level), resource.getrlimit(resource.RLIMIT_NOFILE)
    honest = say_ready

    def ready(what):
        honest(what)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("konnektor.cli.worker.say_ready", ready)
    monkeypatch.setattr("konnektor.cli.control_plane.say_ready", ready)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return (stop.value.code, *capsys.readouterr())

    yield run
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def sentence(result, status):
    """The one line on standard error of a command that failed."""
    code, out, err = result
    assert (code, out) == (status, ""), err
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("konnektor"), err
    return err.removesuffix("\n")


# What works


def test_control_plane(run, certs, tmp_path):
    files = certs.plane
    code, out, err = run(
        "control-plane", "--listen", "127.0.0.1:0", *flags(files),
        "--frontend", "http://127.0.0.1:0", "--frontend", f"http+unix://{tmp_path}/a%20%25.sock",
        "--frontend", f"https://127.0.0.1:0?cert={files.cert}&key={files.key}&client-ca={files.ca}",
        "--forward", "127.0.0.1:0=node-1/10.0.0.7:80", "--forward", "127.0.0.1:0=node-1/[::1]:80",
        "--forward", "udp:127.0.0.1:0=node-1/10.0.0.53:53", "--allow-from", "node-1=udp:10.0.0.1:53",
        "--grant-route", "node-1=cidr=10.0.0.0/8", "--allow-from", "node-1=10.0.0.1:6443",
        "--max-streams", 10_000, "--receive-pool", "1GiB", "--grace", "500ms", "--log-format", "json", "-v",
    )  # fmt: skip
    assert code == 0 and out.count("\n") == 1
    word, *pairs = out.split()
    assert word == "ready"
    assert [pair.partition("=")[0] for pair in pairs] == ["tunnel", "http", "unix", "https"] + ["forward"] * 3
    assert pairs[2] == f"unix={tmp_path}/a%20%25.sock"
    assert pairs[4].endswith("->node-1/10.0.0.7:80") and pairs[5].endswith("->node-1/[::1]:80")
    assert re.fullmatch(r"forward=udp:127\.0\.0\.1:[1-9]\d*->node-1/10\.0\.0\.53:53", pairs[6])
    assert not any(pair.endswith(":0") for pair in pairs[:4])
    assert '"message": "SIGTERM: draining for up to 0.5 s; once more aborts"' in err


def test_a_forward_that_anyone_can_reach_is_told(run, certs):
    where = ("0.0.0.0:0", "127.0.0.1:0", "localhost:0", "udp:0.0.0.0:0", "udp:127.0.0.2:0")
    forwards = [word for listen in where for word in ("--forward", f"{listen}=node-1/10.0.0.7:80")]
    code, _, err = run("control-plane", "--listen", "0.0.0.0:0", *flags(certs.plane), *forwards)
    told = [line.partition(" WARNING ")[2] for line in err.splitlines() if " WARNING " in line]
    assert code == 0 and told == [
        f"konnektor.cli: --forward {listen} serves whoever reaches it, in plaintext: only that address and a "
        "firewall protect it"
        for listen in ("0.0.0.0:0", "udp:0.0.0.0:0")
    ]


def test_worker(run, certs, tmp_path):
    with Process(tmp_path / "log", "control-plane", "--listen", "127.0.0.1:0", *flags(certs.plane)) as plane:
        (where,) = plane.ready()["tunnel"]
        code, out, err = run(
            "worker", "--connect", where, "--server-name", "cp", "--allow", "127.0.0.1:1-9", "--route", "default",
            *flags(certs.worker()), "--grace", "2m",
        )  # fmt: skip
        assert (code, out) == (0, f"ready worker=node-1 connected={where}\n")
        assert "ignored route default, which no --grant-route grants" in plane.log.read_text()
    assert len(err.splitlines()) == 3  # connected, draining, disconnected


async def test_nothing_is_set_aside_for_streams_that_would_be_refused(certs, tmp_path):
    for flag, streams in (((), 64), (("--allow-from", "node-1=127.0.0.1:9"), 1024), (("--max-streams", "100"), 100)):
        plane = Process(tmp_path / "log", "control-plane", "--listen", "127.0.0.1:0", *flags(certs.plane), *flag)
        with plane:
            (where,) = plane.ready()["tunnel"]
            async with kk.Worker([where], tls=certs.worker(), server_name="cp") as worker:
                session = await worker.wait_connected()
                assert session.peer_settings.initial_streams == streams


def test_nothing_but_the_tunnel(run, certs):
    code, out, _ = run("control-plane", "--listen", "127.0.0.1:0", *flags(certs.plane))
    assert code == 0 and out.startswith("ready tunnel=127.0.0.1:") and len(out.split()) == 2


@pytest.mark.parametrize("arguments", [(), ("worker",), ("pki", "issue"), ("demo",), ("control-plane",)])
def test_help(run, arguments):
    code, out, _ = run(*arguments, "--help")
    assert code == 0 and "Usage: konnektor" in out


def test_every_flag_is_in_the_help_with_an_example():
    for name in ("worker", "control-plane", "demo"):
        for option in cli.commands[name].params:
            assert "Example: " in option.help, option.name
            assert option.opts[0] in option.help.partition("Example: ")[2] or "-vv" in option.help, option.name
    assert "_KONNEKTOR_COMPLETE=bash_source" in cli.help and "zsh_source" in cli.help and "fish_source" in cli.help


@pytest.mark.parametrize("arguments", [(), ("pki",)])
def test_the_list_of_commands_is_whole_sentences(run, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(*arguments, "--help")
    commands = out.partition("\nCommands:\n")[2].splitlines()
    assert len(commands) >= 2 and all(re.fullmatch(r"  [-a-z]+ +[A-Z].*[a-zA-Z]\.", line) for line in commands), out


def test_no_command(run):
    code, _, err = run()
    assert code == 2 and "Usage: konnektor" in err


def test_version(run):
    code, out, _ = run("--version")
    word = "not compiled" if mux.__file__.endswith(".py") else "compiled"
    assert code == 0 and re.fullmatch(rf"konnektor, version \S+ \({word}\)\n", out)


# What does not: usage and configuration, status 2

WORKER = ["worker", "--connect", "127.0.0.1:1", "--allow", "127.0.0.1:1", "--ca", "a", "--cert", "b", "--key", "c"]
PLANE = ["control-plane", "--listen", "127.0.0.1:0", "--ca", "a", "--cert", "b", "--key", "c"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no-such-command"], "No such command 'no-such-command'."),
        ([*WORKER, "--frob"], "No such option '--frob'; see --help for those there are"),
        ([*WORKER, "--alow", "h:1"], "No such option '--alow'; did you mean '--allow'?"),
        ([*WORKER, "--memory", "4GiB"], "No such option '--memory'; it belongs to konnektor control-plane"),
        ([*PLANE, "--san", "h"], "No such option '--san'; it belongs to konnektor pki issue"),
        (["--ca", "f"], "No such option '--ca'; it belongs to konnektor control-plane and konnektor worker"),
        ([*WORKER, "extra"], "unexpected extra argument (extra)"),
        (["worker", "--connect", "h:1"], "Missing option '--allow'; write for example --allow 10.0.0.0/8:80,443"),
        (["worker", "--connect", "h"], "'--connect': address 'h' lacks a host or a port"),
        (["worker", "--connect", "::1:8443"], "'--connect': address '::1:8443' has too many colons"),
        (
            ["worker", "--connect", "https://h:1"],
            "'--connect': address 'https://h:1' is a URL: write HOST:PORT, without",
        ),
        (["worker", "--connect", "h:0"], "'--connect': port '0' is not a number from 1 to 65535"),
        ([*WORKER, "--allow", "*:80"], "'--allow': host '*' says nothing"),
        ([*WORKER, "--allow", "10.0.0.1/8:80"], "'--allow': network '10.0.0.1/8' has host bits set: write 10.0.0.0/8"),
        ([*WORKER, "--allow", "h:9-8"], "'--allow': ports '9-8' run backwards"),
        ([*WORKER, "--allow", "10.0.0.7"], "'--allow': rule '10.0.0.7' is not HOST:PORTS"),
        ([*WORKER, "--route", "all"], "'--route': route 'all' is unknown"),
        ([*WORKER, "--server-name", "a b"], "'--server-name': host 'a b' is neither"),
        (
            [*WORKER, "--max-streams", "7"],
            "'--max-streams': '7' is not a number of streams: write one from 8 to 1000000",
        ),
        ([*WORKER, "--max-streams", "abc"], "'--max-streams': 'abc' is not a number of streams: write one from 8"),
        ([*WORKER, "--max-streams", "9" * 5000], "'--max-streams': '999"),
        ([*WORKER, "--replay-buffer", "1"], "'--replay-buffer': 1 is too small: write 256KiB or more"),
        ([*WORKER, "--resume-grace", "25h"], "'--resume-grace': 25h is too long: write 24h or less"),
        ([*WORKER, "--receive-pool", "much"], "'--receive-pool': 'much' is not a size"),
        ([*WORKER, "--receive-pool", "1MiB"], "--receive-pool 1MiB is too small for --max-streams 1024: give it 64MiB"),
        ([*WORKER, "--grace", "soon"], "'--grace': 'soon' is not a duration: write for example 25s"),
        ([*WORKER, "--priority", "*:80"], "'--priority': priority '*:80' names no class: write HOST:PORTS=CLASS"),
        ([*WORKER, "--priority", "*:80=bulk:0"], "'--priority': priority '*:80=bulk:0' has no usable weight: write 1"),
        ([*PLANE, "--memory", "64MiB"], "--memory 64MiB is less than one session may be granted, 80MiB: raise it, or"),
        ([*PLANE, "--memory", "lots"], "'--memory': 'lots' is not a size"),
        ([*PLANE, "--priority", "10.0.0.1/8:80=bulk"], "'--priority': network '10.0.0.1/8' has host bits set"),
        ([*WORKER, "--log-format", "xml"], "'--log-format': 'xml' is not one of 'text', 'json'"),
        (["control-plane"], "Missing option '--listen'; write for example --listen 0.0.0.0:8443"),
        (["control-plane", "--listen", "h:x"], "'--listen': port 'x' is not a number from 0 to 65535"),
        ([*PLANE, "--frontend", "http://0.0.0.0:1"], "'--frontend': frontend 'http://0.0.0.0:1' would serve anyone"),
        ([*PLANE, "--frontend", "https://h:1"], "lacks cert, key, client-ca"),
        ([*PLANE, "--forward", "h:1=w"], "'--forward': forward 'h:1=w' is incomplete: write LISTEN=WORKER/HOST:PORT"),
        ([*PLANE, "--forward", "h:1=W/h:1"], "'--forward': name 'W' is not usable"),
        ([*PLANE, "--grant-route", "default"], "'--grant-route': grant 'default' names no worker"),
        ([*PLANE, "--allow-from", "h:1"], "'--allow-from': grant 'h:1' names no worker"),
        (["demo", "--size", "0"], "'--size': nothing to move"),
        (["pki", "init"], "Missing option '--dir'; write for example --dir pki"),
        (["pki", "issue", "--dir", "x"], "worker, control-plane, client; write for example --role worker"),
    ],
)
def test_usage(run, arguments, text):
    assert text in sentence(run(*arguments), 2)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--forward", "h:1=a/x:1", "--forward", "h:1=b/y:1"], "--forward h:1 is given twice"),
        (["--forward", "udp:[::1]:9=a/x:1", "--forward", "udp:[::1]:9=b/y:1"], "--forward udp:[::1]:9 is given twice"),
        (["--frontend", "http://127.0.0.1:9"] * 2, "--frontend http://127.0.0.1:9 is given twice"),
        (["--frontend", "http+unix:///a"] * 2, "--frontend http+unix:///a is given twice"),
        (
            ["--frontend", "http://127.0.0.1:9", "--forward", "127.0.0.1:9=a/x:1"],
            "--forward 127.0.0.1:9 is where --frontend http://127.0.0.1:9 listens already",
        ),
        (["--forward", "127.0.0.1:7=a/x:1"], "--forward 127.0.0.1:7 is where --listen 127.0.0.1:7 listens already"),
        (["--forward", "0.0.0.0:7=a/x:1"], "--forward 0.0.0.0:7 is where --listen 127.0.0.1:7 listens already"),
        (["--forward", "localhost:7=a/x:1"], "--forward localhost:7 is where --listen 127.0.0.1:7 listens already"),
    ],
)
def test_an_address_given_twice_is_no_other_programs(run, flags, text):
    plane = ["control-plane", "--listen", "127.0.0.1:7", *PLANE[3:]]
    assert text + ": give one of them another address" in sentence(run(*plane, *flags), 2)


def test_addresses_that_do_not_meet(run):
    plane = ["control-plane", "--listen", "127.0.0.1:7", *PLANE[3:]]
    for where in ("127.0.0.2:7", "[::]:7", "[::1]:7", "udp:127.0.0.1:7", "h:7", "127.0.0.1:8"):
        sentence(run(*plane, "--forward", f"{where}=a/x:1"), 3)  # the next thing that is wrong: the files


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ("init --dir NEW --trust-domain Bad!", 2, "'Bad!' cannot be a trust domain; use a lower-case domain name"),
        ("init --dir NEW --days 0", 2, "0 days cannot be a lifetime; use 1 to 36500"),
        ("init --dir CA", 2, "CA/ca.key exists already, and is never overwritten"),
        ("issue --dir NEW --role worker --name w", 3, "NEW holds no CA; make one with: konnektor pki init --dir NEW"),
        ("issue --dir CA --role worker --name Bad", 2, "'Bad' cannot be a name; use up to 63 of a-z, 0-9, '-' and '.'"),
        ("issue --dir CA --role worker --name w --days -1", 2, "-1 days cannot be a lifetime; use 1 to 36500"),
        (
            "issue --dir CA --role control-plane --name c --san a_b!",
            2,
            "'a_b!' is neither a host name nor an IP address",
        ),
        ("issue --dir CA --role worker --name w --out CA/ca.pem", 2, "directory CA/ca.pem cannot be made: File exists"),
        ("issue --dir CA --role worker --name taken", 2, "CA/taken.key exists already, and is never overwritten"),
    ],
)
def test_pki(run, tmp_path, arguments, status, text):
    ca = Certificates(tmp_path)
    ca.worker("taken")
    before = {path: path.read_bytes() for path in ca.folder.iterdir()}

    def named(text):
        return text.replace("CA/", f"{ca.folder}/").replace("CA ", f"{ca.folder} ").replace("NEW", f"{tmp_path}/new")

    line = sentence(run("pki", *named(f"{arguments} ").split()), status)
    assert line.startswith("konnektor: " + named(text))
    assert {path: path.read_bytes() for path in ca.folder.iterdir()} == before


# Certificates and keys, status 3


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Some files may be damaged here."""
    return Certificates(tmp_path_factory.mktemp("own"))


def with_file(files, **changed):
    return flags(type(files)(**{**{name: getattr(files, name) for name in ("ca", "cert", "key")}, **changed}))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda own, _: with_file(own.worker("w"), key="nowhere"),
            "key file /.*/nowhere does not exist; check the path, or issue",
        ),
        (lambda own, _: with_file(own.worker("w"), ca=own.folder), "CA file .* is a directory"),
        (lambda own, _: with_file(own.worker("w"), cert=own.worker("w").key), "holds no certificate in PEM form"),
        (lambda own, _: with_file(own.worker("w"), key=own.worker("v").key), "does not belong to certificate file"),
        (lambda own, _: flags(own.expired("worker", "late")), "certificate file .* expired on"),
        (lambda own, other: with_file(own.worker("w"), ca=other.ca), "was not issued by a CA in"),
        (lambda own, _: flags(own("client", "c")), r"is for a client \(c\), not for a worker"),
        (lambda own, _: flags(own.plane), r"is for a control-plane \(cp\), not for a worker"),
    ],
)
def test_certificates(run, own, foreign, make, text):
    line = sentence(run("worker", "--connect", "127.0.0.1:1", "--allow", "127.0.0.1:1", *make(own, foreign)), 3)
    assert line.startswith("konnektor: ")
    assert re.search(text, line)


def test_a_key_that_may_not_be_read(run, own, monkeypatch):
    if os.geteuid() == 0:  # who may read everything: say it in its place
        original = type(own.folder).open

        def refuse(self, *args, **kwargs):
            if self.suffix == ".key":
                raise PermissionError(13, "Permission denied")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(own.folder), "open", refuse)
    else:
        own.worker("w").key.chmod(0)
    text = sentence(run(*PLANE[:3], *flags(own.worker("w"))), 3)
    assert "may not be read by this user" in text


def test_a_worker_is_no_control_plane(run, certs):
    assert "not for a control-plane" in sentence(run(*PLANE[:3], *flags(certs.worker())), 3)


def test_the_files_of_an_https_frontend(run, certs):
    url = "https://127.0.0.1:0?cert=x&key=y&client-ca=z"
    assert "/z does not exist" in sentence(run(*PLANE[:3], *flags(certs.plane), "--frontend", url), 3)
    url = "https://127.0.0.1:0?cert=a&key=b&client-ca=a%00b"
    text = sentence(run(*PLANE[:3], *flags(certs.plane), "--frontend", url), 3)
    assert text == r"konnektor: CA file 'a\x00b' cannot be read: embedded null byte"


# Listening, status 4


def test_a_port_in_use(run, certs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        text = f"konnektor: cannot listen on {where}: the address is in use"
        plane = flags(certs.plane)
        assert sentence(run("control-plane", "--listen", where, *plane), 4).startswith(text)
        assert sentence(run(*PLANE[:3], *plane, "--frontend", f"http://{where}"), 4).startswith(text)
        assert sentence(run(*PLANE[:3], *plane, "--forward", f"{where}=w/h:1"), 4).startswith(text)


def test_a_path_in_use(run, certs, tmp_path):
    (tmp_path / "x").touch()
    plane = [*PLANE[:3], *flags(certs.plane), "--frontend"]
    text = f"konnektor: cannot listen on {tmp_path}/"
    taken = sentence(run(*plane, f"http+unix://{tmp_path}/x"), 4)
    assert taken == f"{text}x: something that is not a socket is there; remove it first"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(f"{tmp_path}/live")
        live.listen()
        taken = sentence(run(*plane, f"http+unix://{tmp_path}/live"), 4)
    assert taken == f"{text}live: another program is listening there; stop it or choose another path"
    missing = sentence(run(*plane, f"http+unix://{tmp_path}/no/x"), 4)
    assert missing == f"{text}no/x: its directory does not exist; make it first"


# The peer, status 5 with --once


@contextmanager
def server(answer):
    """Somebody who accepts one connection, and answers something."""

    def serve():
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            sock.recv(4096)
            sock.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def once(where, files):
    return ["worker", "--connect", where, "--allow", "127.0.0.1:1", "--once", *flags(files)]


def test_nobody_there(run, certs):
    where = f"127.0.0.1:{unused_port()}"
    assert sentence(run(*once(where, certs.worker())), 5).startswith(
        f"konnektor: cannot reach the control plane at {where}: "
    )


def test_a_name_that_does_not_resolve(run, certs):
    assert "no-such-host.invalid did not resolve" in sentence(run(*once("no-such-host.invalid:1", certs.worker())), 5)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks something other than TLS"),
        (b"\x16\x03\x01garbage" * 9, "speaks something other than TLS"),
        (b"", "the connection before a session was up"),
    ],
)
def test_a_peer_that_speaks_something_else(run, certs, answer, text):
    with server(answer) as where:
        line = sentence(run(*once(where, certs.worker())), 5)
    assert line.startswith(f"konnektor: the control plane at {where} ") and text in line


@pytest.fixture(scope="module")
def plane(certs, tmp_path_factory):
    """Where a control plane listens."""
    log = tmp_path_factory.mktemp("plane") / "log"
    with Process(log, "control-plane", "--listen", "127.0.0.1:0", *flags(certs.plane)) as process:
        yield process.ready()["tunnel"][0]


def test_a_control_plane_of_a_foreign_ca(run, plane, foreign):
    assert sentence(run(*once(plane, foreign.worker())), 5).startswith(
        f"konnektor: the certificate of the control plane at {plane} was not issued by a CA that we trust"
    )


def test_a_server_name_that_the_certificate_is_not_for(run, certs, plane):
    line = sentence(run(*once(plane, certs.worker()), "--server-name", "elsewhere.example"), 5)
    assert line == (
        f"konnektor: the certificate of the control plane at {plane} is not for the name elsewhere.example; "
        "use --server-name with one of its names: cp, localhost, 127.0.0.1, ::1"
    )


@pytest.mark.needs_tool("openssl")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda own: own.worker("cp2"), "is for another role than it has here; issue one with the right --role"),
        (lambda own: own.expired("control-plane", "late-cp"), "expired on "),
    ],
)
def test_a_peer_with_a_certificate_that_is_not_to_be_trusted(run, own, make, text):
    files = make(own)
    command = [
        "openssl",
        "s_server",
        "-accept",
        "127.0.0.1:0",
        "-naccept",
        "1",
        "-tls1_3",
        "-alpn",
        "konnektor/1",
    ]
    command += ["-cert", files.cert, "-key", files.key, "-CAfile", files.ca, "-Verify", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as peer:
        try:
            where = next(line.split()[1] for line in peer.stdout if line.startswith("ACCEPT "))
            line = sentence(run(*once(where, own.worker()), "--server-name", files.cert.stem), 5)
        finally:
            peer.terminate()
    assert line.startswith(f"konnektor: the certificate of the control plane at {where} ") and text in line


# Other ends


def test_a_defect(run, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda *_, **__: 1 / 0)
    code, _, err = run()
    assert code == 1 and err.endswith("konnektor: internal error: ZeroDivisionError\n")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, click.Abort])
def test_interrupted_before_it_began(run, monkeypatch, stop):
    def interrupted(*_, **__):
        raise stop

    monkeypatch.setattr(cli, "main", interrupted)
    assert run() == (130, "", "")


def test_shell_completion():
    result = subprocess.run(
        [sys.executable, "-m", "konnektor"],
        env={**os.environ, "_KONNEKTOR_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_KONNEKTOR_COMPLETE=bash_complete" in result.stdout


def test_values_that_are_parsed_already_stay(certs):
    parsed = Parsed("rule", parse_allow)
    rule = parse_allow("10.0.0.1:1")
    assert parsed.convert(rule, None, None) is rule


def nobody():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("stdout", "why"),
    [(lambda: os.open("/dev/full", os.O_WRONLY), "No space left on device"), (nobody, "Broken pipe")],
)
def test_a_ready_line_that_cannot_be_written_is_told_once_and_ends_nothing(certs, stdout, why):
    command = [sys.executable, "-m", "konnektor", "control-plane", "--listen", "127.0.0.1:0", *flags(certs.plane)]
    output = stdout()
    with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process:
        os.close(output)
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        told = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        watchdog.cancel()
        assert process.wait() == 0, told + rest
    assert f" ERROR konnektor.cli: cannot write the ready line to standard output: {why}; going on without it" in told
    assert rest.count("\n") == 1 and "SIGTERM: draining" in rest


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "args", [("--help",), ("--version",), ("pki", "issue", "-h"), ("worker", "--help")], ids=" ".join
)
@pytest.mark.parametrize(
    ("stdout", "told"),
    [
        (
            lambda: os.open("/dev/full", os.O_WRONLY),
            (2, "konnektor: standard output cannot be written: No space left on device\n"),
        ),
        (nobody, (1, "")),  # as with `| head`
    ],
)
def test_help_that_cannot_be_written(args, unbuffered, stdout, told):
    output = stdout()
    done = subprocess.run(
        [sys.executable, "-m", "konnektor", *args],
        stdout=output,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    os.close(output)
    assert (done.returncode, done.stderr.decode()) == told


def test_nobody_reads_the_ready_line():
    code = "from konnektor.cli.options import say_ready; import sys; sys.stdin.read(); say_ready('x'); say_ready('y')"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.wait() == 0
