"""The least that multiplexes in Python: what frames and one TLS connection cost before anything is made of them."""

from __future__ import annotations

import platform
import sys

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER, Peer
from bench.processes import free_port, wait_for_port

__all__ = ["Sketch"]


class Sketch(Peer):
    """The control plane's side dials the worker's, once."""

    name = "sketch"
    tuned = "as bare, but all over one connection in frames; no credit, no fairness, no limits, no resumption, nothing checked"
    reference = True
    both_ways = False  # each end waits for the other to read

    @classmethod
    def version(cls) -> str:
        return platform.python_version()

    def start(self) -> None:
        files = self.certificates()
        tunnel = free_port()
        far = [f"{tunnel}=127.0.0.1:{port}" for port in self.targets.values()]
        self.run(WORKER, *self._command("worker", files.ca, files.server, files.server_key, *far), cwd=ROOT)
        wait_for_port(tunnel)
        near = [f"{self.ports[target]}=-:0" for target in self.targets]
        onward = f"0={self.path_to(f'127.0.0.1:{tunnel}')}"
        self.run(
            CONTROL_PLANE,
            *self._command("control-plane", files.ca, files.client, files.client_key, *near, onward),
            cwd=ROOT,
        )

    @staticmethod
    def _command(*args: object) -> list[str]:
        return [sys.executable, "-m", "bench.peers.sketch_endpoint", *map(str, args)]
