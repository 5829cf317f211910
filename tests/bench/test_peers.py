"""What the peers run: their commands and settings, without running them."""

import io
import json
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import processes
from bench.__main__ import chosen_peers, parser
from bench.peers import PEERS, Konnektor, asyncssh, bare, chisel, go, haproxy, openssh, peer, sketch
from bench.peers.go import GoPeer
from bench.peers.konnektor import of_tree
from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER, Link, NotStarted, Unusable
from bench.processes import executable, free_port

TARGETS = {"iperf": 10501, "http": 10502}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a peer of this name but for its processes; those and their sides are in ``commands``."""
    monkeypatch.setattr(peer.Peer, "wait_until_ready", lambda _: None)
    for module in (
        peer,
        openssh,
        go,
        chisel,
        haproxy,
        bare,
        sketch,
        asyncssh,
        sys.modules["bench.peers.konnectivity"],
        sys.modules["bench.peers.frp"],
    ):
        monkeypatch.setattr(module, "wait_for_port", lambda _: None)
    monkeypatch.setattr(Konnektor, "_ready_line", _ready)
    monkeypatch.setattr(
        peer.Peer, "run", lambda self, side, *args, **_: self.commands.append((side, [str(a) for a in args]))
    )
    monkeypatch.setattr(openssh.subprocess, "check_call", _make_keys)
    (tmp_path / "chisel-0.log").write_text("2026/01/01 server: Fingerprint c29tZXRoaW5n=\n")

    def start(name, **options):
        kind = PEERS[name]
        monkeypatch.setattr(kind, "commands", [], raising=False)
        return kind(TARGETS, tmp_path, **options)

    return start


def _ready(self, side, command):
    self.run(side, *command)
    return f"ready tunnel=127.0.0.1:{self.tunnel}\n"


def _make_keys(command, **_):
    if "ssh-keygen" in command:
        command[-1].touch()
        command[-1].with_suffix(".pub").touch()


def configuration(commands):
    """All that is said to the processes, in files as well."""
    words = [word for _, command in commands for word in command]
    return " ".join(words) + "".join(Path(word).read_text() for word in words if word.endswith((".cfg", ".json")))


TUNNELS = [name for name in PEERS if name != "direct"]


@pytest.mark.parametrize("name", TUNNELS)
def test_every_target_is_forwarded_from_its_port(name, started):
    made = started(name)
    said = configuration(made.commands)
    for target, port in TARGETS.items():
        assert str(port) in said and str(made.ports[target]) in said
    assert {side for side, _ in made.commands} >= {CONTROL_PLANE, WORKER}


@pytest.mark.parametrize("name", TUNNELS)
def test_nobody_listens_for_strangers(name, started):
    assert "0.0.0.0" not in configuration(started(name).commands)


@pytest.mark.parametrize("name", TUNNELS)
def test_a_link_stands_before_the_end_that_is_dialed(name, started):
    made = started(name, link=Link(0.05, 1e6))
    links = [command for side, command in made.commands if "bench.link" in command]
    assert links and all(side is None for side, command in made.commands if command in links)
    for command in links:
        listens = command[command.index("--listen") + 1].rpartition(":")[2]
        assert command[-4:] == ["--round-trip", "0.05", "--rate", "1e+06"]
        others = [other for other in made.commands if other[1] is not command]
        assert listens in configuration(others)


def flags(commands, side):
    (command,) = [command for where, command in commands if where == side]
    return " ".join(command)


def test_openssh_encrypts_with_its_fastest_cipher_at_either_end(started):
    for name, server, client, option in (
        ("openssh", WORKER, CONTROL_PLANE, "-L"),
        ("openssh-r", CONTROL_PLANE, WORKER, "-R"),
    ):
        made = started(name)
        assert flags(made.commands, server).startswith("sshd -D")
        assert f" {option} 127.0.0.1:{made.ports['http']}:127.0.0.1:10502 " in flags(made.commands, client)
        assert all("Ciphers=aes128-gcm@openssh.com" in command for _, command in made.commands)
        assert " -N " not in flags(made.commands, client) and " -tt " in flags(made.commands, client)
        shutil.rmtree(made.directory / "ssh")


def test_konnektor_is_told_of_many_streams_only_where_there_are(started):
    assert "--max-streams" not in configuration(started("konnektor").commands)
    assert configuration(started("konnektor", streams=10_000).commands).count("--max-streams 10100") == 2


def test_another_tree_runs_its_own_code(tmp_path):
    tree = of_tree(tmp_path)
    assert tree.name == tmp_path.name and tree.env["PYTHONPATH"] == str(tmp_path) and tree.env["PYTHONSAFEPATH"] == "1"
    assert Konnektor.env is None
    assert of_tree(tmp_path, "before").name == "before"


def test_the_trees_that_are_measured_have_the_names_they_are_given():
    args = parser().parse_args(["--konnektor=.", "--against=pure=.", f"--against={ROOT}", "--peers=openssh"])
    assert [peer.name for peer in chosen_peers(args)] == ["konnektor", "pure", ROOT.name, "openssh"]


def test_what_leaves_the_cipher_to_openssl_encrypts_as_the_others():
    code = "import ssl; print(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).get_ciphers()[0]['name'])"
    said = subprocess.check_output([sys.executable, "-c", code], env=peer.with_cipher(), text=True)
    assert said == "TLS_AES_128_GCM_SHA256\n"
    tree = {"PATH": "/bin", "OPENSSL_CONF": "/nowhere"}
    assert peer.with_cipher(tree) == {"PATH": "/bin", "OPENSSL_CONF": str(ROOT / "bench" / "peers" / "openssl.cnf")}


def test_konnektor_and_the_relays_prefer_that_cipher(tmp_path, monkeypatch):
    environments = []
    monkeypatch.setattr(peer.Peer, "wait_until_ready", lambda _: None)
    for module in (bare, sketch):
        monkeypatch.setattr(module, "wait_for_port", lambda _: None)

    def run(self, side, *args, **options):
        environments.append(options["env"]["OPENSSL_CONF"])
        return SimpleNamespace(stdout=io.BytesIO(b"ready tunnel=127.0.0.1:1\n"))

    monkeypatch.setattr(peer.Peer, "run", run)
    for kind in (Konnektor, of_tree(ROOT, "other"), bare.Bare, sketch.Sketch):
        kind(TARGETS, tmp_path)
    assert len(environments) == 8 and set(environments) == {str(ROOT / "bench" / "peers" / "openssl.cnf")}


def test_haproxy_verifies_at_both_ends(started):
    made = started("haproxy")
    for name in ("worker", "control-plane"):
        text = (made.directory / f"{name}.cfg").read_text()
        assert text.count("verify required ssl-min-ver TLSv1.3") == len(TARGETS)
        if (program := executable("haproxy")) is not None:
            done = subprocess.run([program, "-c", "-f", made.directory / f"{name}.cfg"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_frp_has_tls_and_its_multiplexer(started):
    made = started("frp")
    server, client = (json.loads((made.directory / f"{name}.json").read_text()) for name in ("frps", "frpc"))
    assert server["transport"]["tls"]["force"] and client["transport"]["tls"]["enable"]
    assert server["transport"]["tcpMux"] and client["transport"]["tcpMux"]
    assert (client["serverAddr"], client["serverPort"]) == ("127.0.0.1", server["bindPort"])


def test_konnectivity_goes_through_its_socket(started):
    made = started("konnectivity", streams=10_000)
    said = configuration(made.commands)
    assert f"--uds-name={made.directory}/uds" in said and "--mode=http-connect" in said
    connectors = [command for side, command in made.commands if side is None]
    assert len(connectors) > 1 and all(f"{made.directory}/uds" in command for command in connectors)


def test_chisel_checks_the_fingerprint(started):
    assert "--fingerprint c29tZXRoaW5n=" in flags(started("chisel").commands, WORKER)


@pytest.mark.parametrize("name", ["yamux", "smux", "asyncssh", "konnektor"])
def test_many_workers_count_on_no_side(name, started):
    made = started(name)
    before = len(made.commands)
    made.dial_many(3)
    ((side, command),) = made.commands[before:]
    assert side is None and "3" in command and f"127.0.0.1:{made.tunnel}" in command


@pytest.mark.parametrize(
    "kind", [kind for kind in PEERS.values() if issubclass(kind, GoPeer)], ids=lambda kind: kind.name
)
def test_go_modules_are_pinned(kind):
    module = ROOT / "bench" / "peers" / kind.name
    assert re.fullmatch(r"v\d+\.\d+\.\d+", kind.version())
    assert f"{kind.module} {kind.version()} h1:" in (module / "go.sum").read_text()


@pytest.mark.parametrize("name", ["openssh", "yamux", "haproxy"])
def test_a_missing_program_leaves_a_peer_out(name, monkeypatch):
    monkeypatch.setattr(peer, "executable", lambda _: None)
    with pytest.raises(Unusable, match=r"is missing: .*Debian"):
        PEERS[name].prepare()


def test_a_missing_package_leaves_asyncssh_out(monkeypatch):
    monkeypatch.setattr(asyncssh.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unusable, match="extra `bench`"):
        PEERS["asyncssh"].prepare()


def test_what_go_cannot_build_is_left_out_with_its_last_word(monkeypatch, tmp_path):
    compiler = tmp_path / "go"
    compiler.write_text("#!/bin/sh\necho 'go: downloading nothing' >&2\necho 'go: no network' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(go, "BUILT", tmp_path / "built")
    for module in (go, peer):
        monkeypatch.setattr(module, "executable", lambda _: str(compiler))
    with pytest.raises(Unusable, match=r"^go could not build \.: go: no network$"):
        PEERS["yamux"].prepare()


def test_a_peer_that_does_not_start_leaves_nothing_running(tmp_path):
    class Broken(PEERS["direct"]):
        def start(self):
            self.run(WORKER, sys.executable, "-c", "import time; time.sleep(60)")
            started.append(self)
            raise RuntimeError("no")

    started = []
    with pytest.raises(NotStarted, match="no"):
        Broken(TARGETS, tmp_path)
    assert started[0].processes[0].returncode is not None


def test_a_free_port_is_not_given_twice_before_anybody_listens(monkeypatch):
    given = {free_port(), free_port()}
    draw, again = random.randrange, [*given]
    monkeypatch.setattr(processes.random, "randrange", lambda *span: again.pop() if again else draw(*span))
    assert free_port() not in given and not again


def test_a_peer_whose_port_is_taken_says_so_in_its_own_words(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = iter([free_port(), free_port(), port])
        monkeypatch.setattr(peer, "free_port", lambda: next(free))
        with pytest.raises(NotStarted, match=rf"the control plane did not start, status 4; .*127\.0\.0\.1:{port}"):
            Konnektor(TARGETS, tmp_path)


def test_a_killed_process_comes_back_on_its_side(tmp_path):
    class Sleeper(PEERS["direct"]):
        def start(self):
            self.run(CONTROL_PLANE, sys.executable, "-c", "import time; time.sleep(60)")

    made = Sleeper(TARGETS, tmp_path)
    try:
        (first,) = made.sides[CONTROL_PLANE]
        again = made.kill(first)
        assert first.returncode == -9 and made.sides[CONTROL_PLANE] == []
        assert again().args == first.args and len(made.sides[CONTROL_PLANE]) == 1
    finally:
        made.stop()
    assert all(process.returncode is not None for process in made.processes)
