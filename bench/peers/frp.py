"""frp: frps and frpc, TLS and its multiplexer on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from bench.peers.go import GoPeer
from bench.peers.peer import CONTROL_PLANE, WORKER
from bench.processes import wait_for_port

__all__ = ["Frp"]


class Frp(GoPeer):
    name = "frp"
    tuned = "mutual TLS, `tcpMux`, 64 connections in advance (`poolCount`) rather than 5; one TLS connection"
    module = "github.com/fatedier/frp"
    programs: ClassVar = {name: f"github.com/fatedier/frp/cmd/{name}" for name in ("frps", "frpc")}
    tags = "noweb"  # the pages of its dashboard are not in the module

    def start(self) -> None:
        server, client = self.directory / "frps.json", self.directory / "frpc.json"
        server.write_text(json.dumps(self.server_settings()))
        self.run(CONTROL_PLANE, self.program("frps"), "-c", server)
        wait_for_port(self.tunnel)
        client.write_text(json.dumps(self.client_settings(self.path_to(f"127.0.0.1:{self.tunnel}"))))
        self.run(WORKER, self.program("frpc"), "-c", client)

    def server_settings(self) -> dict[str, object]:
        files = self.certificates()
        tls = {"force": True, **self._tls(files.server, files.server_key)}
        return {
            "bindAddr": "127.0.0.1", "bindPort": self.tunnel, "proxyBindAddr": "127.0.0.1", "log": {"level": "error"},
            "transport": {"tcpMux": True, "maxPoolCount": 64, "tls": tls},
        }  # fmt: skip

    def client_settings(self, address: str) -> dict[str, object]:
        files = self.certificates()
        host, _, port = address.rpartition(":")
        tls = {"enable": True, **self._tls(files.client, files.client_key)}
        return {
            "serverAddr": host, "serverPort": int(port), "log": {"level": "error"},
            "transport": {"tcpMux": True, "poolCount": 64, "tls": tls},
            "proxies": [
                {"name": target, "type": "tcp", "localIP": "127.0.0.1", "localPort": port, "remotePort": self.ports[target]}
                for target, port in self.targets.items()
            ],
        }  # fmt: skip

    def _tls(self, cert: Path, key: Path) -> dict[str, str]:
        return {"certFile": str(cert), "keyFile": str(key), "trustedCaFile": str(self.certificates().ca)}
