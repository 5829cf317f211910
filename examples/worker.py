"""A worker: dials the control plane, and lets it reach what the rules allow.

    konnektor pki issue --dir pki --role worker --name node-1
    python examples/worker.py pki node-1 127.0.0.1:8443 --allow 127.0.0.1:8000 --allow '10.0.0.0/8:80,443'

It reconnects for ever; Ctrl-C lets open streams finish for a few seconds and ends it.
"""

import argparse
import asyncio
import contextlib
import logging

import konnektor as kk


async def main(pki: str, name: str, connect: str, allow: list[str]) -> None:
    worker = kk.Worker(
        [connect],
        tls=kk.TLSFiles(f"{pki}/ca.pem", f"{pki}/{name}.pem", f"{pki}/{name}.key"),
        allow=allow,
    )
    async with worker:
        session = await worker.wait_connected()
        print(f"{name} connected to {session.peer_name}, round trip {await session.ping() * 1000:.1f} ms", flush=True)
        try:
            await worker.wait_closed()
        except asyncio.CancelledError:
            await worker.drain(5)
            raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Dial a control plane and serve it.")
    parser.add_argument("pki")
    parser.add_argument("name")
    parser.add_argument("connect", metavar="HOST:PORT")
    parser.add_argument("--allow", action="append", default=[], metavar="HOST-OR-CIDR:PORTS")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(main(arguments.pki, arguments.name, arguments.connect, arguments.allow))
    except kk.KonnektorError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
