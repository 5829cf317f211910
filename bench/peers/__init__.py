"""The tunnels that are compared: each starts its real processes and forwards local ports to targets."""

from __future__ import annotations

from bench.peers.asyncssh import AsyncSSH
from bench.peers.bare import Bare
from bench.peers.chisel import Chisel
from bench.peers.direct import Direct
from bench.peers.frp import Frp
from bench.peers.haproxy import HAProxy
from bench.peers.konnectivity import Konnectivity
from bench.peers.konnektor import Konnektor
from bench.peers.openssh import OpenSSH, OpenSSHReverse
from bench.peers.peer import Peer
from bench.peers.sketch import Sketch
from bench.peers.smux import Smux
from bench.peers.yamux import Yamux

__all__ = ["PEERS", "Konnektor", "Peer"]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Konnektor, OpenSSH, OpenSSHReverse, Yamux, Smux, Konnectivity, Chisel, Frp, AsyncSSH, HAProxy, Bare,
        Sketch, Direct
    )
}  # fmt: skip
"""By name, konnektor first: it is always measured."""
