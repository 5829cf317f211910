"""A relay of as little Python as can be, a TLS connection for each connection: what any tunnel in Python has to pay."""

from __future__ import annotations

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER
from bench.peers.relay import Relay
from bench.processes import free_port, wait_for_port

__all__ = ["Bare"]


class Bare(Relay):
    """As haproxy here: the control plane's side dials the worker's, once for each connection."""

    name = "bare"
    tuned = "uvloop and konnektor's own socket transports and allocator settings, TLS 1.3 with AES-128-GCM, and nothing else: no frames, no multiplexing, no limits"
    module = "bench.peers.bare_endpoint"
    most_streams = 9_000  # two descriptors each, of 20,000

    def start(self) -> None:
        legs = {target: free_port() for target in self.targets}
        far = [f"{legs[target]}=127.0.0.1:{port}" for target, port in self.targets.items()]
        self.run(WORKER, *self.command("worker", *far), cwd=ROOT)
        for port in legs.values():
            wait_for_port(port)
        near = [f"{port}={self.path_to(f'127.0.0.1:{legs[target]}')}" for target, port in self.ports.items()]
        self.run(CONTROL_PLANE, *self.command("control-plane", *near), cwd=ROOT)
