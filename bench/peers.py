"""The tunnels that are compared: each starts its real processes and forwards local ports to targets."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for_port(port: int, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time of processes and all their descendants that live."""
    parents: dict[int, list[tuple[int, int]]] = {}
    ticks = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid = int(entry.name)
            ticks[pid] = int(stat[11]) + int(stat[12])
            parents.setdefault(int(stat[1]), []).append((pid, 0))
    total, queue = 0, list(roots)
    while queue:
        pid = queue.pop()
        total += ticks.get(pid, 0)
        queue += [child for child, _ in parents.get(pid, ())]
    return total / os.sysconf("SC_CLK_TCK")


class Peer(ABC):
    """A running tunnel."""

    name = ""

    def __init__(self, targets: Mapping[str, int], directory: Path) -> None:
        self.directory = directory
        self.ports = {target: free_port() for target in targets}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start(targets)
        for port in self.ports.values():
            wait_for_port(port)

    @abstractmethod
    def start(self, targets: Mapping[str, int]) -> None:
        """Starts the processes that forward each of ``ports`` to its target."""

    @property
    @abstractmethod
    def version(self) -> str:
        """What is measured."""

    def run(self, *args: str, **kwargs: object) -> subprocess.Popen[bytes]:
        with (self.directory / f"{self.name}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(args, stderr=log, **kwargs)  # type: ignore[call-overload]
        self.processes.append(process)
        return process

    def cpu(self) -> float:
        return cpu_seconds(process.pid for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


class Konnektor(Peer):
    """Both endpoints by the command line, as anybody would run them."""

    name = "konnektor"
    python = sys.executable
    env: Mapping[str, str] = os.environ

    @property
    def version(self) -> str:
        return subprocess.check_output([self.python, "-m", "konnektor", "--version"], text=True).split()[-1]

    def path_to(self, control_plane: str) -> str:
        """What the worker dials: the control plane, or what stands before it."""
        return control_plane

    def start(self, targets: Mapping[str, int]) -> None:
        pki = self.directory / "pki"
        base = [self.python, "-m", "konnektor"]
        if not pki.exists():
            subprocess.check_call([*base, "pki", "init", "--dir", pki], stdout=subprocess.DEVNULL)
            for role, name in (("control-plane", "cp"), ("worker", "node")):
                command = [*base, "pki", "issue", "--dir", pki, "--role", role, "--name", name]
                subprocess.check_call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        forwards = []
        for target, port in targets.items():
            forwards += ["--forward", f"127.0.0.1:{self.ports[target]}=node/127.0.0.1:{port}"]

        def files(name: str) -> list[str]:
            return ["--ca", f"{pki}/ca.pem", "--cert", f"{pki}/{name}.pem", "--key", f"{pki}/{name}.key"]

        pipe = {"stdout": subprocess.PIPE, "env": self.env}
        plane = self.run(*base, "control-plane", "--listen", "127.0.0.1:0", *files("cp"), *forwards, **pipe)
        assert plane.stdout is not None
        found = re.search(rb"tunnel=(\S+)", plane.stdout.readline())
        assert found is not None, f"the control plane did not start: see {self.directory}"
        allow = [f"--allow=127.0.0.1:{port}" for port in targets.values()]
        worker = self.run(*base, "worker", "--connect", self.path_to(found[1].decode()), *files("node"), *allow, **pipe)
        assert worker.stdout is not None
        assert worker.stdout.readline().startswith(b"ready"), f"the worker did not start: see {self.directory}"


class OpenSSH(Peer):
    """``ssh -L`` to an sshd of our own: AES-128-GCM, no compression, one connection."""

    name = "openssh"

    @property
    def version(self) -> str:
        return subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.split(",")[0]

    def start(self, targets: Mapping[str, int]) -> None:
        directory = self.directory / "ssh"
        if not directory.exists():
            directory.mkdir(mode=0o700)
            for key in ("host", "user"):
                subprocess.check_call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key])
            shutil.copy(directory / "user.pub", directory / "authorized")
        port = free_port()
        Path("/run/sshd").mkdir(exist_ok=True)
        self.run(
            shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", str(port),
            "-o", "ListenAddress=127.0.0.1", "-h", str(directory / "host"), "-o", "PidFile=none",
            "-o", f"AuthorizedKeysFile={directory}/authorized", "-o", "StrictModes=no", "-o", "UsePAM=no",
            "-o", "PermitRootLogin=yes", "-o", "Ciphers=aes128-gcm@openssh.com", "-o", "MaxSessions=10000",
        )  # fmt: skip
        wait_for_port(port)
        forwards = []
        for target, target_port in targets.items():
            forwards += ["-L", f"127.0.0.1:{self.ports[target]}:127.0.0.1:{target_port}"]
        self.run(
            "ssh", "-N", "-F", "/dev/null", "-i", str(directory / "user"), "-p", str(port), *forwards,
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "Compression=no",
            "-o", "Ciphers=aes128-gcm@openssh.com", "-o", "ExitOnForwardFailure=yes", "-o", "LogLevel=ERROR",
            f"{getpass.getuser()}@127.0.0.1",
        )  # fmt: skip


class Direct(Peer):
    """No tunnel: what the tools themselves reach here."""

    name = "direct"
    version = "-"

    def start(self, targets: Mapping[str, int]) -> None:
        self.ports = dict(targets)


PEERS = {peer.name: peer for peer in (Konnektor, OpenSSH, Direct)}
