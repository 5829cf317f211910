"""Peers that are Go programs: built from the module of their name in this directory, into build/peers/."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from typing import ClassVar

from bench.peers.peer import CONTROL_PLANE, ROOT, WORKER, Peer, Unusable
from bench.processes import executable, wait_for_port

__all__ = ["GoPeer", "GoTunnel"]

BUILT = ROOT / "build" / "peers"
BUILDING = 900
"""Seconds: Konnectivity takes more than a minute on two cores."""


class GoPeer(Peer):
    """One that go builds.

    Attributes:
        module: the path of what is measured, as go.mod has it.
        programs: package by the name of the executable.
        tags: for the build.
    """

    module: ClassVar[str]
    programs: ClassVar[Mapping[str, str]]
    tags: ClassVar[str] = ""
    needs: ClassVar = {"go": "Debian's package is golang-go; go.mod says which version is needed"}

    @classmethod
    def folder(cls) -> str:
        return cls.name

    @classmethod
    def prepare(cls) -> None:
        super().prepare()
        BUILT.mkdir(parents=True, exist_ok=True)
        for program, package in cls.programs.items():
            command = [
                executable("go") or "go",
                "build",
                "-trimpath",
                "-tags",
                cls.tags,
                "-o",
                str(BUILT / program),
                package,
            ]
            done = subprocess.run(
                command, cwd=ROOT / "bench" / "peers" / cls.folder(), capture_output=True, text=True, check=False, timeout=BUILDING,
                env={**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"},
            )  # fmt: skip
            if done.returncode:
                raise Unusable(
                    f"go could not build {package}: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}"
                )

    @classmethod
    def version(cls) -> str:
        text = (ROOT / "bench" / "peers" / cls.folder() / "go.mod").read_text()
        found = re.search(rf"^(?:require)?\s+{re.escape(cls.module)} (v\S+)", text, re.MULTILINE)
        assert found is not None, f"go.mod does not name {cls.module}"
        return found[1]

    @classmethod
    def program(cls, name: str) -> str:
        return str(BUILT / name)


class GoTunnel(GoPeer):
    """The tunnels that bench/peers/tunnel is the frame of."""

    dials_many = True

    def start(self) -> None:
        self.run(CONTROL_PLANE, *self.serve_command())
        wait_for_port(self.tunnel)
        self.run(WORKER, *self.work_command(self.path_to(f"127.0.0.1:{self.tunnel}")))

    def serve_command(self) -> list[str]:
        files = self.certificates()
        forwards = ",".join(f"127.0.0.1:{self.ports[target]}={port}" for target, port in self.targets.items())
        return [
            self.program(self.name), "control-plane", "-tunnel", f"127.0.0.1:{self.tunnel}", "-ca", str(files.ca),
            "-cert", str(files.server), "-key", str(files.server_key), "-forward", forwards,
        ]  # fmt: skip

    def work_command(self, address: str, sessions: int = 1) -> list[str]:
        files = self.certificates()
        return [
            self.program(self.name), "worker", "-tunnel", address, "-ca", str(files.ca), "-cert", str(files.client),
            "-key", str(files.client_key), "-sessions", str(sessions),
        ]  # fmt: skip

    def dial_many(self, count: int) -> subprocess.Popen[bytes]:
        return self.run(None, *self.work_command(f"127.0.0.1:{self.tunnel}", count), stdout=subprocess.PIPE)
