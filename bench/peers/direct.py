"""No tunnel: what the tools themselves reach here."""

from __future__ import annotations

from bench.peers.peer import Peer

__all__ = ["Direct"]


class Direct(Peer):
    name = "direct"
    tuned = "no tunnel: what the tools themselves reach"
    reference = True

    @classmethod
    def version(cls) -> str:
        return "-"

    def start(self) -> None:
        self.ports = dict(self.targets)

    def wait_until_ready(self) -> None:
        """The targets are."""
