"""OpenSSH, from either end: its server and its client, one connection."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from bench.peers.peer import CONTROL_PLANE, WORKER, Peer, said
from bench.processes import wait_for_port

__all__ = ["OpenSSH", "OpenSSHReverse"]

ADVICE = "Debian's packages are openssh-client and openssh-server"
CIPHER = "Ciphers=aes128-gcm@openssh.com"


class OpenSSH(Peer):
    """``ssh -L``: the client is on the control plane's side, and dials."""

    name = "openssh"
    # sshd switches Nagle's algorithm off only for a session with a terminal; with -N every other small answer waits 40 ms for
    # an acknowledgement.
    tuned = "AES-128-GCM, its fastest cipher here; no compression; a terminal (`-tt`) rather than `-N`, or Nagle's algorithm adds 40 ms to its tails"
    needs: ClassVar = {"ssh": ADVICE, "sshd": ADVICE, "ssh-keygen": ADVICE}
    server, client, option = WORKER, CONTROL_PLANE, "-L"

    @classmethod
    def version(cls) -> str:
        return said(["ssh", "-V"], r"(OpenSSH\S+)")

    def start(self) -> None:
        directory = self.directory / "ssh"
        directory.mkdir(mode=0o700)
        for key in ("host", "user"):
            subprocess.check_call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key])
        shutil.copy(directory / "user.pub", directory / "authorized")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.run(self.server, *self.server_command(directory))
        wait_for_port(self.tunnel)
        port = int(self.path_to(f"127.0.0.1:{self.tunnel}").rpartition(":")[2])
        self.run(self.client, *self.client_command(directory, port))

    def server_command(self, directory: Path) -> list[str]:
        return [
            "sshd", "-D", "-e", "-f", "/dev/null", "-p", str(self.tunnel), "-h", str(directory / "host"),
            "-o", "ListenAddress=127.0.0.1", "-o", f"AuthorizedKeysFile={directory}/authorized", "-o", "PidFile=none",
            "-o", "StrictModes=no", "-o", "UsePAM=no", "-o", "PermitRootLogin=yes", "-o", CIPHER,
        ]  # fmt: skip

    def client_command(self, directory: Path, port: int) -> list[str]:
        forwards = []
        for target, target_port in self.targets.items():
            forwards += [self.option, f"127.0.0.1:{self.ports[target]}:127.0.0.1:{target_port}"]
        return [
            "ssh", "-tt", "-F", "/dev/null", "-i", str(directory / "user"), "-p", str(port), *forwards,
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "Compression=no", "-o", CIPHER,
            "-o", "ExitOnForwardFailure=yes", "-o", "LogLevel=ERROR", f"{getpass.getuser()}@127.0.0.1", "exec sleep 1000000",
        ]  # fmt: skip


class OpenSSHReverse(OpenSSH):
    """``ssh -R``: the client is on the worker's side, and dials."""

    name = "openssh-r"
    server, client, option = CONTROL_PLANE, WORKER, "-R"
