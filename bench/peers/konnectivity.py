"""Konnectivity, the tunnel of Kubernetes: proxy server and agent, clients by HTTP CONNECT on a Unix socket."""

from __future__ import annotations

from typing import ClassVar

from bench.peers.go import GoPeer
from bench.peers.peer import CONTROL_PLANE, WORKER
from bench.processes import free_port, wait_for_port

__all__ = ["Konnectivity"]

MODULE = "sigs.k8s.io/apiserver-network-proxy"
CONNECTOR = 2000
"""Streams that are left to one connector: its descriptors are 20,000."""


class Konnectivity(GoPeer):
    """The connector that turns local connections into CONNECT requests is on the client's side, and is not counted."""

    name = "konnectivity"
    tuned = (
        "http-connect on a Unix socket, as kube-apiserver uses it; mutual TLS; logging down to errors (`-v 0`); "
        "the connector before it (bench/peers/konnectivity) splices in the kernel, and its CPU time and memory are not counted"
    )
    module = MODULE
    programs: ClassVar = {
        "konnectivity-server": f"{MODULE}/cmd/server",
        "konnectivity-agent": f"{MODULE}/cmd/agent",
        "konnectivity-connect": ".",
    }

    def start(self) -> None:
        self.run(CONTROL_PLANE, *self.server_command())
        wait_for_port(self.tunnel)
        self.run(WORKER, *self.agent_command(self.path_to(f"127.0.0.1:{self.tunnel}")))
        for _ in range(1 + self.streams // CONNECTOR):
            self.run(None, *self.connect_command())

    def server_command(self) -> list[str]:
        files = self.certificates()
        return [
            self.program("konnectivity-server"), "--mode=http-connect", f"--uds-name={self.directory}/uds", "--server-port=0",
            f"--agent-port={self.tunnel}", "--agent-bind-address=127.0.0.1", f"--cluster-ca-cert={files.ca}",
            f"--cluster-cert={files.server}", f"--cluster-key={files.server_key}", f"--admin-port={free_port()}",
            f"--health-port={free_port()}", "--health-bind-address=127.0.0.1", "-v", "0",
        ]  # fmt: skip

    def agent_command(self, address: str) -> list[str]:
        files = self.certificates()
        host, _, port = address.rpartition(":")
        return [
            self.program("konnectivity-agent"), f"--proxy-server-host={host}", f"--proxy-server-port={port}",
            f"--ca-cert={files.ca}", f"--agent-cert={files.client}", f"--agent-key={files.client_key}",
            f"--admin-server-port={free_port()}", f"--health-server-port={free_port()}", "--health-server-host=127.0.0.1",
            "-v", "0",
        ]  # fmt: skip

    def connect_command(self) -> list[str]:
        forwards = ",".join(f"127.0.0.1:{self.ports[target]}=127.0.0.1:{port}" for target, port in self.targets.items())
        return [self.program("konnectivity-connect"), "-uds", f"{self.directory}/uds", "-forward", forwards]
