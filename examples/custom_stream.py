"""A stream type of one's own: run a command where the worker is, its input and output through the tunnel.

    python examples/custom_stream.py

Both ends run here, over real mutual TLS on the loopback address.
"""

import asyncio
import tempfile
from typing import ClassVar

import anyio
from anyio.streams.stapled import StapledByteStream

import konnektor as kk
from konnektor.testing import certificates


class Exec(kk.StreamType, frozen=True):
    """Its fields travel in OPEN, and are checked on arrival. NAME@DOMAIN needs no registry."""

    name: ClassVar[str] = "exec@acme.example"
    argv: list[str]


COMMANDS = {"tr", "wc"}  # the policy of this type; of a built-in one it is the worker's allow list


async def run(stream: kk.Stream, request: Exec) -> None:
    """The worker's side."""
    if not request.argv or request.argv[0] not in COMMANDS:
        await stream.reject(kk.Code.DENIED, "no such command here")
        return
    async with await anyio.open_process(request.argv, stderr=None) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await stream.accept()
        await kk.relay(stream, StapledByteStream(process.stdin, process.stdout))


async def ask(session: kk.Session, argv: list[str], text: str) -> str:
    """The control plane's side."""
    async with await session.open(Exec(argv)) as stream:
        await stream.send(text.encode())
        await stream.send_eof()
        return b"".join([chunk async for chunk in stream]).decode().strip()


async def main(pki: str) -> None:
    made = certificates(pki, "node-1")
    async with kk.ControlPlane("127.0.0.1:0", tls=made.control_plane) as control_plane:
        worker = kk.Worker([control_plane.address], tls=made.workers["node-1"])
        worker.handle(Exec)(run)  # or @worker.handle(Exec) above run()
        async with worker:
            session = await control_plane.wait_for("node-1")
            print(await ask(session, ["tr", "a-z", "A-Z"], "through the tunnel"))
            print(await ask(session, ["wc", "-w"], "four words, counted there"))
            try:
                await ask(session, ["rm", "-rf", "/"], "")
            except kk.DeniedError as error:
                print(f"refused: {error}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
