"""Ports, and what processes use of the machine."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = [
    "PATIENCE",
    "cpu_seconds",
    "executable",
    "free_port",
    "interruptible",
    "machine_time",
    "raise_descriptor_limit",
    "resident_kb",
    "user_and_system",
    "wait_for_http",
    "wait_for_port",
]

PROC = Path("/proc")
PATIENCE = 20.0
"""Seconds that a process may take to serve."""

_given: set[int] = set()
"""Ports that were handed out: nobody listens on them at once, so that one might be found free twice."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around a program that starts others: SIGTERM ends it as Ctrl-C does, with none of them left behind and no traceback.

    It exits with status 130.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def executable(name: str) -> str | None:
    """Its path; server programs live in sbin, which is not on everybody's PATH."""
    return shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])
    )


def free_port() -> int:
    """One that nobody listens on, below those that the kernel gives to outgoing connections; never the same again."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def wait_for_port(port: int, seconds: float = PATIENCE) -> None:
    """Waits until something listens.

    Raises:
        OSError: nothing does.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def wait_for_http(port: int, seconds: float = PATIENCE) -> None:
    """Waits until a web server answers there: not only the near end listens, the far end is reached, too.

    Raises:
        OSError: none does.
        http.client.HTTPException: something else does.
    """
    end = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except (OSError, http.client.HTTPException):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        finally:
            connection.close()


def _family(roots: Iterable[int]) -> dict[int, int]:
    """Ticks of processor time by process, of these and all their descendants that live."""
    children: dict[int, list[int]] = {}
    ticks = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid = int(entry.name)
            ticks[pid] = int(stat[11]) + int(stat[12])
            children.setdefault(int(stat[1]), []).append(pid)
    found, queue = {}, list(roots)
    while queue:
        pid = queue.pop()
        if pid in ticks:
            found[pid] = ticks[pid]
        queue += children.get(pid, ())
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time of processes and all their descendants that live."""
    return sum(_family(roots).values()) / os.sysconf("SC_CLK_TCK")


def machine_time() -> tuple[float, float]:
    """Seconds since it was started that all cores together were idle, and in all (proc(5), ``/proc/stat``)."""
    ticks = [int(word) for word in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    hz = os.sysconf("SC_CLK_TCK")
    return (ticks[3] + ticks[4]) / hz, sum(ticks) / hz


def user_and_system(pid: int) -> tuple[float, float]:
    """Seconds of processor time that a process has spent by itself, and the kernel for it."""
    stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(stat[11]) / tick, int(stat[12]) / tick


def resident_kb(roots: Iterable[int]) -> int:
    """Resident memory of processes and all their descendants that live, in KB."""
    total = 0
    for pid in _family(roots):
        try:
            status = (PROC / str(pid) / "status").read_text()
        except OSError:
            continue
        total += int((status.partition("VmRSS:")[2].split() or ["0"])[0])  # a zombie has none
    return total


def raise_descriptor_limit() -> int:
    """As many descriptors as are allowed, here and in every process started from here; how many those are."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
