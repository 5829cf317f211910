"""The load tools: iperf3 and wrk, and what they report."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.peer import Peer

__all__ = [
    "Failed",
    "Load",
    "Transfer",
    "parse_iperf",
    "parse_wrk",
    "transfer",
    "transfer_begun",
    "whole",
    "wrk",
]

PATIENCE = 30.0
"""Seconds beyond its own time that a tool gets."""
PERCENTILES = (50, 99, 99.9)


class Failed(Exception):
    """A tool did not measure; the text says why.

    Attributes:
        figures: what was measured before.
    """

    def __init__(self, text: str, figures: Mapping[str, float] | None = None) -> None:
        super().__init__(text)
        self.figures = figures or {}


def whole(seconds: float) -> int:
    """What both tools take; to iperf3 half a second is none, and that is for ever."""
    return max(1, round(seconds))


# Bulk


@dataclass(frozen=True)
class Transfer:
    """What iperf3's receivers counted, all streams and both directions together.

    Attributes:
        rate: MB/s.
        bytes: in all.
    """

    rate: float
    bytes: float


def parse_iperf(out: bytes) -> Transfer:
    """Of ``iperf3 -J``.

    Raises:
        Failed: it reports an error, or nothing, or that nothing arrived.
    """
    try:
        report: dict[str, Any] = json.loads(out)
    except ValueError:
        raise Failed("iperf3 reported nothing") from None
    if "error" in report:
        raise Failed(f"iperf3: {report['error']}")
    end = report["end"]
    sums = [end["sum_received"], *([end["sum_received_bidir_reverse"]] if "sum_received_bidir_reverse" in end else [])]
    arrived = sum(each["bytes"] for each in sums)
    if not arrived:
        raise Failed("iperf3: nothing arrived")
    return Transfer(sum(each["bits_per_second"] for each in sums) / 8e6, arrived)


def iperf(port: int, seconds: float, *args: str) -> list[str]:
    return ["iperf3", "-J", "-c", "127.0.0.1", "-p", str(port), "-t", str(whole(seconds)), *args]


@contextmanager
def server(port: int) -> Iterator[None]:
    """An iperf3 server for one test, when it is ready.

    Its own word for it is taken: a probe of the port would be that test. One that is kept for more tests is busy for a
    moment after each, and for good (3.12) after one that broke off.

    Raises:
        Failed: it does not start.
    """
    command = ["iperf3", "-s", "-1", "--forceflush", "-B", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        if not any(b"Server listening" in line for line in process.stdout):
            raise Failed("the iperf3 server did not start")
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def transfer_begun(peer: Peer, seconds: float, *args: str) -> Iterator[Callable[[], Transfer]]:
    """A test that runs beside something else; what the block gets waits for its end.

    Raises:
        Failed: it failed.
    """
    with server(peer.targets["iperf"]):
        process = subprocess.Popen(
            iperf(peer.ports["iperf"], seconds, *args), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

        def ended() -> Transfer:
            try:
                out, _ = process.communicate(timeout=seconds + PATIENCE)
            except subprocess.TimeoutExpired:
                raise Failed(f"iperf3 did not end within {seconds + PATIENCE:g} s") from None
            return parse_iperf(out)

        try:
            yield ended
        finally:
            process.kill()
            process.communicate()


def transfer(peer: Peer, seconds: float, *args: str) -> Transfer:
    """One test.

    Raises:
        Failed: it failed.
    """
    with transfer_begun(peer, seconds, *args) as ended:
        return ended()


# Requests

SCRIPT = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\nresult {"seconds": %%.6f, "requests": %%d, "errors": %%d, "latency": {', summary.duration / 1e6,
    summary.requests, e.connect + e.read + e.write + e.status + e.timeout))
  local between = ""
  for _, p in ipairs({%s}) do
    io.write(string.format('%%s"%%g": %%.6f', between, p, latency:percentile(p) / 1e3))
    between = ", "
  end
  io.write("}}\\n")
end
"""
"""For wrk: its own --latency stops at 99 %."""


@dataclass(frozen=True)
class Load:
    """What wrk counted.

    Attributes:
        seconds: that it took.
        requests: answered.
        latency: milliseconds by percentile.
    """

    seconds: float
    requests: int
    latency: Mapping[str, float]

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    def figures(self) -> dict[str, float]:
        return {f"p{percentile}": value for percentile, value in self.latency.items()}


def parse_wrk(out: str) -> Load:
    """Of wrk with ``SCRIPT``.

    Raises:
        Failed: requests failed, or nothing is reported.
    """
    line = next((line for line in out.splitlines() if line.startswith("result ")), None)
    if line is None:
        raise Failed(f"wrk reported nothing: {' '.join(out.split())[-200:]}")
    result = json.loads(line.removeprefix("result "))
    if result["errors"]:
        raise Failed(f"wrk: {result['errors']} requests failed")
    if not result["requests"]:
        raise Failed("wrk: no request was answered")
    return Load(result["seconds"], result["requests"], result["latency"])


def wrk(port: int, seconds: float, connections: int, *args: str) -> Load:
    """GET / over so many connections at once, kept alive.

    Raises:
        Failed: requests failed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT % ", ".join(f"{p:g}" for p in PERCENTILES))
        script.flush()
        command = [
            "wrk", "-t", str(min(2, connections)), "-c", str(connections), "-d", str(whole(seconds)), "--timeout", "10",
            "-s", str(Path(script.name)), *args, f"http://127.0.0.1:{port}/",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"wrk did not end within {seconds + PATIENCE:g} s") from None
    return parse_wrk(done.stdout + done.stderr)
