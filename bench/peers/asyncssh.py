"""asyncssh: SSH in Python, over uvloop; the worker dials and asks for forwards, as ssh -R does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER, Peer, Unusable
from bench.processes import wait_for_port

__all__ = ["AsyncSSH"]


class AsyncSSH(Peer):
    name = "asyncssh"
    tuned = "uvloop, AES-128-GCM, no compression, gc.freeze() after start-up"
    dials_many = True

    @classmethod
    def prepare(cls) -> None:
        if importlib.util.find_spec("asyncssh") is None:
            raise Unusable("the package asyncssh is missing: the extra `bench` has it, and `make bench` installs that")

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version("asyncssh")

    def start(self) -> None:
        self.run(CONTROL_PLANE, *self.command("control-plane", f"127.0.0.1:{self.tunnel}"), cwd=ROOT)
        wait_for_port(self.tunnel)
        forwards = [f"{self.ports[target]}={port}" for target, port in self.targets.items()]
        self.run(WORKER, *self.command("worker", self.path_to(f"127.0.0.1:{self.tunnel}"), *forwards), cwd=ROOT)

    def command(self, role: str, address: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "bench.peers.asyncssh_endpoint", role, str(self.directory), address, *more]

    def dial_many(self, count: int) -> subprocess.Popen[bytes]:
        command = self.command("worker", f"127.0.0.1:{self.tunnel}", "--sessions", str(count))
        return self.run(None, *command, stdout=subprocess.PIPE, cwd=ROOT)
