"""The least that multiplexes in Python: what frames and one TLS connection cost before anything is made of them."""

from __future__ import annotations

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER
from bench.peers.relay import Relay
from bench.processes import free_port, wait_for_port

__all__ = ["Sketch"]


class Sketch(Relay):
    """The control plane's side dials the worker's, once."""

    name = "sketch"
    tuned = "as bare, but all over one connection in frames; no credit, no fairness, no limits, no resumption, nothing checked"
    module = "bench.peers.sketch_endpoint"
    by_default = False
    both_ways = False  # each end waits for the other to read

    def start(self) -> None:
        tunnel = free_port()
        targets = [f"127.0.0.1:{port}" for port in self.targets.values()]
        self.run(WORKER, *self.command("worker", str(tunnel), *targets), cwd=ROOT)
        wait_for_port(tunnel)
        onward = self.path_to(f"127.0.0.1:{tunnel}")
        ports = [str(self.ports[target]) for target in self.targets]
        self.run(CONTROL_PLANE, *self.command("control-plane", onward, *ports), cwd=ROOT)
