"""konnektor itself: both endpoints by the command line, as anybody would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER, NotStarted, Peer, with_cipher
from bench.processes import PATIENCE
from konnektor import pki

__all__ = ["Konnektor", "of_tree"]


class Konnektor(Peer):
    """``konnektor control-plane --forward`` and ``konnektor worker``."""

    name = "konnektor"
    tuned = "the command line's defaults, but for AES-128-GCM (by OPENSSL_CONF) and `--max-streams` where a column opens more than 1,000"
    dials_many = True
    env: ClassVar[Mapping[str, str] | None] = None

    @classmethod
    def version(cls) -> str:
        command = [sys.executable, "-m", "konnektor", "--version"]
        return subprocess.check_output(command, text=True, env=cls.env).removeprefix("konnektor, version ").strip()

    def start(self) -> None:
        files = self.certificates()
        base = [sys.executable, "-m", "konnektor"]
        forwards: list[str] = []
        for target, port in self.targets.items():
            forwards += ["--forward", f"127.0.0.1:{self.ports[target]}=node/127.0.0.1:{port}"]
        serve = [
            *base, "control-plane", "--listen", f"127.0.0.1:{self.tunnel}", "--ca", str(files.ca),
            "--cert", str(files.server), "--key", str(files.server_key), *forwards, *self.flags(CONTROL_PLANE),
        ]  # fmt: skip
        ready = re.match(r"ready tunnel=(\S+)", self._ready_line(CONTROL_PLANE, serve))
        assert ready is not None
        work = [
            *base, "worker", "--connect", self.path_to(ready[1]), "--ca", str(files.ca),
            "--cert", str(files.client), "--key", str(files.client_key),
            *(f"--allow=127.0.0.1:{port}" for port in self.targets.values()), *self.flags(WORKER),
        ]  # fmt: skip
        self._ready_line(WORKER, work)

    def flags(self, side: str) -> list[str]:
        """More of them, for either side's command."""
        return ["--max-streams", str(self.streams + 100)] if self.streams > 1000 else []

    def _ready_line(self, side: str, command: list[str]) -> str:
        process = self.run(side, *command, stdout=subprocess.PIPE, env=with_cipher(self.env))
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("ready"):
            raise NotStarted(f"the {side} did not start, status {process.wait(PATIENCE)}")
        return line

    def dial_many(self, count: int) -> subprocess.Popen[bytes]:
        folder = self.certificates().ca.parent
        for number in range(count):
            if not (folder / f"w{number}.pem").exists():
                pki.issue(folder, "worker", f"w{number}")
        # By its file: another tree has a bench/ of its own. With -P this directory's konnektor.py is not taken for konnektor.
        script = ROOT / "bench" / "peers" / "konnektor_workers.py"
        command = [sys.executable, "-P", str(script), f"127.0.0.1:{self.tunnel}", str(folder), str(count)]
        return self.run(None, *command, stdout=subprocess.PIPE, env=self.env or {**os.environ, "PYTHONPATH": str(ROOT)})


def of_tree(tree: Path, name: str | None = None) -> type[Konnektor]:
    """Another checkout of konnektor, or a build; without a name under that of its directory."""
    # Without SAFEPATH the working directory wins, and the same code is measured twice.
    env = {**os.environ, "PYTHONPATH": str(tree.resolve()), "PYTHONSAFEPATH": "1"}
    name = name or tree.resolve().name
    return type(name, (Konnektor,), {"name": name, "env": env})
