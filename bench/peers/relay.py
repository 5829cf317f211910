"""Relays in Python that are no tunnel one would want, and show what one costs: what *bare* and *sketch* have in common."""

from __future__ import annotations

import platform
import ssl
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

from bench.peers.peer import Peer, with_cipher
from konnektor import runtime

__all__ = ["Relay", "run_end"]


class Relay(Peer):
    """Two processes of one module, with ``ROLE CA CERT KEY`` and arguments of its own.

    Attributes:
        module: has a ``main``, which is ``run_end`` of its relay.
    """

    reference = True
    module: ClassVar[str]

    @classmethod
    def version(cls) -> str:
        return platform.python_version()

    def run(self, side: str | None, *args: str | Path, **kwargs: object) -> subprocess.Popen[bytes]:
        return super().run(side, *args, **{"env": with_cipher(), **kwargs})

    def command(self, role: str, *args: str) -> list[str]:
        files = self.certificates()
        own = (files.server, files.server_key) if role == "worker" else (files.client, files.client_key)
        return [sys.executable, "-m", self.module, role, str(files.ca), *map(str, own), *args]


def run_end(relay: Callable[[str, ssl.SSLContext, list[str]], Coroutine[Any, Any, None]]) -> None:
    """Runs one end as the command line says; the worker's is the TLS server."""
    role, ca, cert, key, *args = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "worker" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(cert, key)
    runtime.run(relay(role, context, args))
