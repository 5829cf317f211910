"""An endpoint made of asyncssh: ``python -m bench.peers.asyncssh_endpoint control-plane|worker DIRECTORY HOST:PORT ...``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from pathlib import Path

import asyncssh

from konnektor import runtime

OPTIONS = {"encryption_algs": ["aes128-gcm@openssh.com"], "compression_algs": ["none"], "keepalive_interval": 15}
REDIAL = 0.1


class Server(asyncssh.SSHServer):
    """Lets the worker listen here."""

    def server_requested(self, listen_host: str, listen_port: int) -> bool:
        return True


def key(directory: Path, name: str) -> asyncssh.SSHKey:
    file = directory / name
    if not file.exists():
        made = asyncssh.generate_private_key("ssh-ed25519")
        made.write_private_key(file)
        made.write_public_key(file.with_suffix(".pub"))
    return asyncssh.read_private_key(file)


async def serve(directory: Path, host: str, port: int) -> None:
    keys = asyncssh.import_authorized_keys(key(directory, "user").export_public_key().decode())
    await asyncssh.listen(
        host, port, server_factory=Server, server_host_keys=[key(directory, "host")], authorized_client_keys=keys, backlog=4096,
        **OPTIONS,
    )  # fmt: skip
    gc.freeze()
    await asyncio.Event().wait()


class Count:
    """Says how long it took until all sessions were up, each time they are."""

    def __init__(self, wanted: int) -> None:
        self.up, self.wanted, self.since = 0, wanted, time.monotonic()

    def add(self, change: int) -> None:
        if self.up == self.wanted:
            self.since = time.monotonic()
        self.up += change
        if self.up == self.wanted:
            print(f"connected {self.up} in {time.monotonic() - self.since:.6f} s", flush=True)


async def session(directory: Path, host: str, port: int, forwards: list[str], count: Count) -> None:
    known = asyncssh.import_known_hosts(f"[{host}]:{port} {key(directory, 'host').export_public_key().decode()}")
    user = key(directory, "user")
    while True:
        try:
            async with asyncssh.connect(
                host,
                port,
                username="bench",
                known_hosts=known,
                client_keys=[user],
                config=None,
                login_timeout=300,
                **OPTIONS,
            ) as connection:
                for forward in forwards:
                    local, target = map(int, forward.split("="))
                    await connection.forward_remote_port("127.0.0.1", local, "127.0.0.1", target)
                count.add(1)
                try:
                    await connection.wait_closed()
                finally:
                    count.add(-1)
        except (OSError, asyncssh.Error):
            pass
        await asyncio.sleep(REDIAL)


async def work(directory: Path, host: str, port: int, forwards: list[str], sessions: int) -> None:
    count = Count(sessions)
    async with asyncio.TaskGroup() as group:
        for _ in range(sessions):
            group.create_task(session(directory, host, port, forwards, count))
        gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.asyncssh_endpoint", description=__doc__)
    parser.add_argument("role", choices=["control-plane", "worker"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("address")
    parser.add_argument("forwards", nargs="*", help="PORT-HERE=PORT-THERE")
    parser.add_argument("--sessions", type=int, default=1)
    args = parser.parse_args()
    host, _, port = args.address.rpartition(":")
    if args.role == "control-plane":
        runtime.run(serve(args.directory, host, int(port)))
    else:
        runtime.run(work(args.directory, host, int(port), args.forwards, args.sessions))


if __name__ == "__main__":
    main()
