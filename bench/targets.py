"""What the tunnels lead to: nginx, and a port for the iperf3 server of each test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.processes import executable, free_port, wait_for_port

__all__ = ["TOOLS", "missing_tools", "targets"]

TOOLS = ("iperf3", "wrk", "nginx")

NGINX = """
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/nginx.err;
worker_rlimit_nofile {descriptors}; events {{ worker_connections {connections}; }}
http {{ access_log off; keepalive_requests 100000000; keepalive_timeout 1h; client_body_temp_path {dir}; proxy_temp_path {dir};
  fastcgi_temp_path {dir}; uwsgi_temp_path {dir}; scgi_temp_path {dir};
  server {{ listen 127.0.0.1:{port} backlog=4096; return 200 "ok\\n"; }} }}
"""


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if executable(tool) is None]


@contextmanager
def targets(directory: Path, descriptors: int) -> Iterator[dict[str, int]]:
    """Ports by name: "http" of a server that lives in the block, "iperf" of one that each test starts."""
    ports = {"iperf": free_port(), "http": free_port()}
    config = directory / "nginx.conf"
    config.write_text(
        NGINX.format(dir=directory, port=ports["http"], descriptors=descriptors, connections=descriptors - 100)
    )
    command = [executable("nginx") or "nginx", "-c", str(config), "-e", str(directory / "nginx.err")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(ports["http"])
        yield ports
    finally:
        process.terminate()
        process.wait()
