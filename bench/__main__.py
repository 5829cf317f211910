"""Measures konnektor beside its peers: ``python -m bench --peers konnektor,openssh --repeats 3``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.columns import COLUMNS
from bench.peers import PEERS, Konnektor, Peer, free_port, wait_for_port

NGINX = """
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/nginx.err;
events {{ worker_connections 16384; }}
http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {dir}; proxy_temp_path {dir};
  fastcgi_temp_path {dir}; uwsgi_temp_path {dir}; scgi_temp_path {dir};
  server {{ listen 127.0.0.1:{port} backlog=4096; return 200 "ok\\n"; }} }}
"""


@contextmanager
def targets(directory: Path) -> Iterator[dict[str, int]]:
    """iperf3 twice (it serves one test at a time) and nginx."""
    ports = {"iperf": free_port(), "iperf2": free_port(), "http": free_port()}
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(dir=directory, port=ports["http"]))
    commands = [
        ["iperf3", "-s", "-B", "127.0.0.1", "-p", str(ports["iperf"])],
        ["iperf3", "-s", "-B", "127.0.0.1", "-p", str(ports["iperf2"])],
        [shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config), "-e", str(directory / "nginx.err")],
    ]
    processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    try:
        for port in ports.values():
            wait_for_port(port)
        yield ports
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def rows(results: dict[str, dict[str, dict[str, list[float]]]]) -> Iterator[str]:
    peers = list(next(iter(results.values())))
    yield "| column | figure | " + " | ".join(peers) + " |"
    yield "|---|---|" + "---|" * len(peers)
    for column, by_peer in results.items():
        for figure in by_peer[peers[0]]:
            cells = []
            for peer in peers:
                values = by_peer[peer][figure]
                low, middle, high = min(values), statistics.median(values), max(values)
                digits = 0 if middle >= 100 else 2 if middle >= 1 else 3
                cells.append(f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            yield f"| {column} | {figure} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--peers", default="konnektor,openssh", help=", ".join(PEERS))
    parser.add_argument("--columns", default=",".join(COLUMNS), help=", ".join(COLUMNS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--against", metavar="TREE", type=Path, action="append", default=[],
                        help="another checkout of konnektor, measured beside this one; may be repeated")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write every sample here")
    args = parser.parse_args()
    for tool in ("iperf3", "wrk", "nginx", "ssh"):
        if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin") is None:
            sys.exit(f"{tool} is missing: the benchmark needs iperf3, wrk, nginx and OpenSSH's client and server")
    chosen: list[type[Peer]] = [PEERS[name] for name in args.peers.split(",")]
    for tree in args.against:
        # Without SAFEPATH the working directory wins, and the same code is measured twice.
        env = {**os.environ, "PYTHONPATH": str(tree.resolve()), "PYTHONSAFEPATH": "1"}
        chosen.append(type(tree.name, (Konnektor,), {"name": tree.name, "env": env}))
    columns = args.columns.split(",")
    results: dict[str, dict[str, dict[str, list[float]]]] = {c: {p.name: {} for p in chosen} for c in columns}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = stack.enter_context(targets(directory))
        peers = []
        for peer_class in chosen:
            own = directory / peer_class.name
            own.mkdir()
            peer = peer_class(ports, own)
            stack.callback(peer.stop)
            peers.append(peer)
        for repeat in range(args.repeats):
            for column in columns:
                for peer in peers:
                    figures = COLUMNS[column](peer, args.seconds)
                    for figure, value in figures.items():
                        results[column][peer.name].setdefault(figure, []).append(value)
                    shown = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
                    print(
                        f"{repeat + 1}/{args.repeats} {column:12} {peer.name:10} {shown}", file=sys.stderr, flush=True
                    )
        versions = ", ".join(f"{peer.name} {peer.version}" for peer in peers)
    print(f"`python -m bench {' '.join(sys.argv[1:])}`\n")
    print(f"{versions}; Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}; "
          f"median (lowest-highest) of {args.repeats} interleaved repeats\n")  # fmt: skip
    print("\n".join(rows(results)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
