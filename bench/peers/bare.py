"""A relay of as little Python as can be, a TLS connection for each connection: what any tunnel in Python has to pay."""

from __future__ import annotations

import platform
import sys

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER, Peer
from bench.processes import free_port, wait_for_port

__all__ = ["Bare"]


class Bare(Peer):
    """As haproxy here: the control plane's side dials the worker's, once for each connection."""

    name = "bare"
    tuned = "uvloop and konnektor's own socket transports and allocator settings, TLS 1.3, and nothing else: no frames, no multiplexing, no limits"
    reference = True
    most_streams = 9_000  # two descriptors each, of 20,000

    @classmethod
    def version(cls) -> str:
        return platform.python_version()

    def start(self) -> None:
        files = self.certificates()
        legs = {target: free_port() for target in self.targets}
        far = [f"{legs[target]}=127.0.0.1:{port}" for target, port in self.targets.items()]
        self.run(WORKER, *self._command("worker", files.ca, files.server, files.server_key, *far), cwd=ROOT)
        for port in legs.values():
            wait_for_port(port)
        near = [f"{port}={self.path_to(f'127.0.0.1:{legs[target]}')}" for target, port in self.ports.items()]
        self.run(
            CONTROL_PLANE, *self._command("control-plane", files.ca, files.client, files.client_key, *near), cwd=ROOT
        )

    @staticmethod
    def _command(*args: object) -> list[str]:
        return [sys.executable, "-m", "bench.peers.bare_endpoint", *map(str, args)]
