"""haproxy at both ends, a TLS connection for each connection: what encryption alone costs, without multiplexing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from bench.peers.peer import CONTROL_PLANE, WORKER, Certificates, Peer, said
from bench.processes import free_port, wait_for_port

__all__ = ["HAProxy"]

HEAD = """
global
  maxconn 9900
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
"""


class HAProxy(Peer):
    """It is no reverse tunnel: the control plane's side dials the worker's, once for each connection."""

    name = "haproxy"
    tuned = "mutual TLS 1.3 with AES-128-GCM, a thread for each core, buffers as they are by default (larger ones gained nothing); no multiplexing"
    needs: ClassVar = {"haproxy": "Debian's package is haproxy"}
    reference = True
    most_streams = 9_000  # two descriptors each, of 20,000

    @classmethod
    def version(cls) -> str:
        return said(["haproxy", "-v"], r"version (\S+)")

    def start(self) -> None:
        files = self.certificates()
        for name, cert, key in (("server", files.server, files.server_key), ("client", files.client, files.client_key)):
            (self.directory / f"{name}.pem").write_bytes(cert.read_bytes() + key.read_bytes())
        legs = {target: free_port() for target in self.targets}
        far, near = self.directory / "worker.cfg", self.directory / "control-plane.cfg"
        far.write_text(self.far_settings(files, legs))
        self.run(WORKER, "haproxy", "-db", "-f", far)
        for port in legs.values():
            wait_for_port(port)
        addresses = {target: self.path_to(f"127.0.0.1:{port}") for target, port in legs.items()}
        near.write_text(self.near_settings(files, addresses))
        self.run(CONTROL_PLANE, "haproxy", "-db", "-f", near)

    def far_settings(self, files: Certificates, legs: dict[str, int]) -> str:
        return HEAD + "".join(
            f"listen {target}\n  bind 127.0.0.1:{legs[target]} ssl crt {self._pair('server')} ca-file {files.ca} verify required"
            f" ssl-min-ver TLSv1.3\n  server target 127.0.0.1:{port}\n"
            for target, port in self.targets.items()
        )

    def near_settings(self, files: Certificates, addresses: dict[str, str]) -> str:
        return HEAD + "".join(
            f"listen {target}\n  bind 127.0.0.1:{self.ports[target]}\n  server worker {address} ssl crt {self._pair('client')}"
            f" ca-file {files.ca} verify required ssl-min-ver TLSv1.3\n"
            for target, address in addresses.items()
        )

    def _pair(self, name: str) -> Path:
        return self.directory / f"{name}.pem"
