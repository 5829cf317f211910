"""A running tunnel: what every peer has in common."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import ClassVar, Self

from bench.processes import cpu_seconds, executable, free_port, resident_kb, wait_for_http, wait_for_port
from konnektor import pki

__all__ = [
    "CONTROL_PLANE",
    "ROOT",
    "SIDES",
    "WORKER",
    "Certificates",
    "Link",
    "NotStarted",
    "Peer",
    "Unusable",
    "said",
    "with_cipher",
]

ROOT = Path(__file__).parents[2]

CONTROL_PLANE = "control plane"
"""The side that listens for local clients."""
WORKER = "worker"
"""The side that the targets are on."""
SIDES = (CONTROL_PLANE, WORKER)


def with_cipher(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment, by default this process's, in which OpenSSL prefers AES-128-GCM."""
    return {**(os.environ if env is None else env), "OPENSSL_CONF": str(ROOT / "bench" / "peers" / "openssl.cnf")}


class Unusable(Exception):
    """A peer cannot be measured here; the text says why, and what to do."""


class NotStarted(Exception):
    """A peer does not serve; the text says why, and the last that was said by those of its processes that are over."""


@dataclass(frozen=True)
class Certificates:
    """Files of a CA and of both ends: ``server`` for the one that is dialed, ``client`` for the one that dials."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


@dataclass(frozen=True)
class Link:
    """What lies between the two ends.

    Attributes:
        round_trip: seconds.
        rate: bytes a second; None for no limit.
    """

    round_trip: float
    rate: float | None = None


class Peer(ABC):
    """Both ends, started by the constructor; ``ports`` are where local clients reach the targets.

    Args:
        targets: port by name; if one is called "http", a web server is there.
        directory: for files and logs; exists.
        link: what the connection between the ends goes through; None for the loopback interface itself.
        streams: how many are wanted at once.

    Attributes:
        name: as given to ``--peers``.
        tuned: how, in a sentence or two for the documents.
        reference: shown beside the others, but not one to be compared with: it does another job.
        by_default: measured also when no peers are named.
        needs: programs without which it cannot be started, and what to say of them.
        most_streams: that it can have open at once here.
        dials_many: ``dial_many`` works.
        both_ways: goes on when it is full in both directions at once.

    Raises:
        NotStarted: whatever was started is stopped.
    """

    name: ClassVar[str]
    tuned: ClassVar[str]
    reference: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    needs: ClassVar[Mapping[str, str]] = {}
    most_streams: ClassVar[int] = 10_000
    dials_many: ClassVar[bool] = False
    both_ways: ClassVar[bool] = True

    def __init__(
        self, targets: Mapping[str, int], directory: Path, *, link: Link | None = None, streams: int = 1000
    ) -> None:
        self.targets = dict(targets)
        self.directory = directory
        self.link = link
        self.streams = streams
        self.ports = {target: free_port() for target in targets}
        self.tunnel = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.sides: dict[str, list[subprocess.Popen[bytes]]] = {side: [] for side in SIDES}
        self._begun: dict[int, tuple[str | None, tuple[str | Path, ...], dict[str, object]]] = {}
        self._others = 0
        try:
            self.start()
            self.wait_until_ready()
        except Exception as error:
            # Here, since the logs are in a directory that does not outlive the run.
            words = self._last_words()
            self.stop()
            raise NotStarted("; ".join([f"{error}", *words])) from error
        except BaseException:
            self.stop()
            raise

    # What a peer is

    @classmethod
    def prepare(cls) -> None:
        """Looks for what it needs, and builds what must be built.

        Raises:
            Unusable: it cannot be had here.
        """
        for program, advice in cls.needs.items():
            if executable(program) is None:
                raise Unusable(f"{program} is missing: {advice}")

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Of what is measured."""

    @abstractmethod
    def start(self) -> None:
        """Starts the processes that forward each of ``ports`` to its target."""

    def wait_until_ready(self) -> None:
        for port in self.ports.values():
            wait_for_port(port)
        if "http" in self.ports:
            wait_for_http(self.ports["http"])

    def dial_many(self, count: int) -> subprocess.Popen[bytes]:
        """More workers, of one process that is on no side.

        They dial the control plane, and again whenever their connection ends. Each time that all of them are connected it
        says on standard output ``connected COUNT in SECONDS s``: since the first was to dial, or since one of them lost its
        connection.
        """
        raise NotImplementedError

    # Parts

    def run(self, side: str | None, *args: str | Path, **kwargs: object) -> subprocess.Popen[bytes]:
        """Starts a process; with None it serves the measurement, and neither its time nor its memory counts."""
        command = [str(arg) for arg in args]
        with self.log(len(self.processes)).open("ab") as file:
            options = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL, **kwargs}
            process: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
                [executable(command[0]) or command[0], *command[1:]], **options
            )
        self.processes.append(process)
        self._begun[process.pid] = (side, args, kwargs)
        if side is not None:
            self.sides[side].append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> Callable[[], subprocess.Popen[bytes]]:
        """Ends a process without a word; what is returned starts it again."""
        side, args, kwargs = self._begun.pop(process.pid)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if side is not None:
            self.sides[side].remove(process)
        return lambda: self.run(side, *args, **kwargs)

    def log(self, number: int) -> Path:
        """What a process says on standard error, and on standard output if nobody reads that."""
        return self.directory / f"{self.name}-{number}.log"

    def _last_words(self) -> list[str]:
        """The last line of every process that is over and said something."""
        logs = [self.log(number) for number, process in enumerate(self.processes) if process.poll() is not None]
        texts = [log.read_text(errors="replace").strip() for log in logs]
        return [text.splitlines()[-1] for text in texts if text]

    def path_to(self, address: str) -> str:
        """What is dialed to reach the other end: its address, or that of the link before it."""
        if self.link is None:
            return address
        port = free_port()
        rate = [] if self.link.rate is None else ["--rate", f"{self.link.rate:g}"]
        listen = f"127.0.0.1:{port}"
        self.run(
            None, sys.executable, "-m", "bench.link", address, "--listen", listen,
            "--round-trip", f"{self.link.round_trip:g}", *rate, cwd=ROOT,
        )  # fmt: skip
        wait_for_port(port)
        return listen

    def certificates(self) -> Certificates:
        """Of this tunnel alone, ECDSA P-256."""
        folder = self.directory / "pki"
        if folder.exists():
            ca, server, client = (folder / f"{name}.pem" for name in ("ca", "cp", "node"))
        else:
            ca = pki.init_ca(folder).cert
            server = pki.issue(folder, "control-plane", "cp").cert
            client = pki.issue(folder, "worker", "node").cert
        return Certificates(ca, server, server.with_suffix(".key"), client, client.with_suffix(".key"))

    # What is measured

    def cpu(self) -> float:
        """Seconds, of both ends so far; not a number without ends."""
        pids = [process.pid for side in SIDES for process in self.sides[side]]
        return cpu_seconds(pids) if pids else nan

    def resident(self, side: str) -> int:
        """KB."""
        return resident_kb(process.pid for process in self.sides[side])

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    @contextmanager
    def another(self, *, link: Link | None = None, streams: int = 1000) -> Iterator[Self]:
        """One of the same kind, fresh, for as long as it is needed."""
        self._others += 1
        directory = self.directory / f"another-{self._others}"
        directory.mkdir()
        peer = type(self)(self.targets, directory, link=link, streams=streams)
        try:
            yield peer
        finally:
            peer.stop()

    def stop(self) -> None:
        """Ends every process, and waits for it."""
        ends = [process for side in SIDES for process in self.sides[side]]
        others = [process for process in self.processes if process not in ends]
        # An end that loses its connection first may want it back: what is between them goes last.
        self._end(ends)
        self._end(others)

    @staticmethod
    def _end(processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def said(command: list[str], pattern: str) -> str:
    """What a program says of its version."""
    done = subprocess.run(
        [executable(command[0]) or command[0], *command[1:]], capture_output=True, text=True, check=False
    )
    found = re.search(pattern, done.stdout + done.stderr)
    return found[1] if found else "?"
