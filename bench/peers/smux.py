"""xtaci/smux over Go's TLS 1.3."""

from __future__ import annotations

from typing import ClassVar

from bench.peers.go import GoTunnel

__all__ = ["Smux"]


class Smux(GoTunnel):
    name = "smux"
    tuned = "mutual TLS 1.3 with full records from the start; protocol version 2, frames of 64 KiB, 4 MiB a stream, 64 MiB in all"
    module = "github.com/xtaci/smux"
    programs: ClassVar = {"smux": "."}
