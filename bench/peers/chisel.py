"""chisel: SSH over a WebSocket; the worker is its client, with reverse forwards."""

from __future__ import annotations

import re
import subprocess
from typing import ClassVar

from bench.peers.go import GoPeer
from bench.peers.peer import CONTROL_PLANE, WORKER
from bench.processes import wait_for_port

__all__ = ["Chisel"]

USER = "bench:bench"


class Chisel(GoPeer):
    name = "chisel"
    tuned = "password and fingerprint checked; no TLS around it, since the SSH within encrypts already and twice would be slower"
    module = "github.com/jpillora/chisel"
    programs: ClassVar = {"chisel": "github.com/jpillora/chisel"}

    def start(self) -> None:
        subprocess.check_call(
            [self.program("chisel"), "server", "--keygen", self.directory / "key"], stderr=subprocess.DEVNULL
        )
        self.run(CONTROL_PLANE, *self.server_command())
        wait_for_port(self.tunnel)
        fingerprint = re.search(r"Fingerprint (\S+)", self.log(0).read_text())
        assert fingerprint is not None, f"chisel's server says no fingerprint: see {self.log(0)}"
        self.run(WORKER, *self.client_command(self.path_to(f"127.0.0.1:{self.tunnel}"), fingerprint[1]))

    def server_command(self) -> list[str]:
        return [
            self.program("chisel"), "server", "--reverse", "--host", "127.0.0.1", "--port", str(self.tunnel),
            "--keyfile", str(self.directory / "key"), "--auth", USER,
        ]  # fmt: skip

    def client_command(self, address: str, fingerprint: str) -> list[str]:
        remotes = [f"R:127.0.0.1:{self.ports[target]}:127.0.0.1:{port}" for target, port in self.targets.items()]
        return [
            self.program("chisel"),
            "client",
            "--fingerprint",
            fingerprint,
            "--auth",
            USER,
            f"http://{address}",
            *remotes,
        ]
