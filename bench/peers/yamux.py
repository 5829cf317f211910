"""hashicorp/yamux over Go's TLS 1.3: the library under Consul, Nomad and many tunnels."""

from __future__ import annotations

from typing import ClassVar

from bench.peers.go import GoTunnel

__all__ = ["Yamux"]


class Yamux(GoTunnel):
    name = "yamux"
    tuned = "mutual TLS 1.3 with full records from the start; windows of 4 MiB rather than 256 KiB, backlog 4,096"
    module = "github.com/hashicorp/yamux"
    programs: ClassVar = {"yamux": "."}
