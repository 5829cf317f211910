"""What is measured, with real tools: iperf3 and wrk, against iperf3 and nginx."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.peers import Peer

Figures = Mapping[str, float]


def iperf(port: int, *args: str) -> list[str]:
    return ["iperf3", "-J", "-c", "127.0.0.1", "-p", str(port), *args]


def transfer(port: int, *args: str) -> Mapping[str, Any]:
    """One iperf3 test. Its server takes one at a time, and turns away the first while it sees to the port's probe."""
    for _ in range(5):
        out = json.loads(subprocess.run(iperf(port, *args), stdout=subprocess.PIPE, check=False).stdout)
        if "error" not in out:
            break
        time.sleep(0.5)
    if "error" in out:
        raise RuntimeError(out["error"])
    return out["end"]["sum_received"]


def bulk(peer: Peer, seconds: float, *args: str) -> Figures:
    """MB/s as received, and CPU seconds of both endpoints together per GB."""
    before = peer.cpu()
    received = transfer(peer.ports["iperf"], "-t", f"{seconds:g}", *args)
    time.sleep(0.2)
    cpu = peer.cpu() - before
    return {"MB/s": received["bits_per_second"] / 8e6, "CPU s/GB": cpu / (received["bytes"] / 1e9)}


_LATENCY = re.compile(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s)$", re.MULTILINE)
_UNIT = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def wrk(port: int, seconds: float, *args: str) -> Figures:
    command = ["wrk", "--latency", "-d", f"{seconds:g}", *args, f"http://127.0.0.1:{port}/"]
    out = subprocess.check_output(command, text=True)
    if "Socket errors" in out or "Non-2xx" in out:
        raise RuntimeError(out)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert rate is not None
    latency = {f"p{p} ms": float(value) * _UNIT[unit] for p, value, unit in _LATENCY.findall(out)}
    return {"req/s": float(rate[1]), **latency}


def beside(peer: Peer, seconds: float) -> Figures:
    """One client's small requests beside four bulk uploads, and what the uploads kept."""
    uploads = subprocess.Popen(iperf(peer.ports["iperf2"], "-P", "4", "-t", f"{seconds + 2:g}"), stdout=subprocess.PIPE)
    time.sleep(1)
    figures = wrk(peer.ports["http"], seconds, "-t", "1", "-c", "1")
    out = json.loads(uploads.communicate()[0])
    return {"p50 ms": figures["p50 ms"], "p99 ms": figures["p99 ms"],
            "bulk MB/s": out["end"]["sum_received"]["bits_per_second"] / 8e6}  # fmt: skip


def requests(peer: Peer, seconds: float, *args: str) -> Figures:
    """As wrk reports them, and CPU seconds of both endpoints together per 100,000."""
    before = peer.cpu()
    figures = wrk(peer.ports["http"], seconds, *args)
    cpu = peer.cpu() - before
    return {**figures, "CPU s/100k": cpu / (figures["req/s"] * seconds / 1e5)}


COLUMNS: dict[str, Callable[[Peer, float], Figures]] = {
    "up": bulk,
    "down": lambda peer, seconds: bulk(peer, seconds, "-R"),
    "up8": lambda peer, seconds: bulk(peer, seconds, "-P", "8"),
    "down8": lambda peer, seconds: bulk(peer, seconds, "-P", "8", "-R"),
    "requests32": lambda peer, seconds: requests(peer, seconds, "-t", "2", "-c", "32"),
    "requests1": lambda peer, seconds: requests(peer, seconds, "-t", "1", "-c", "1"),
    "connections": lambda peer, seconds: requests(peer, seconds, "-t", "2", "-c", "16", "-H", "Connection: close"),
    "beside": beside,
}
