"""A control plane that fetches a page through every worker that connects.

    konnektor pki init --dir pki
    konnektor pki issue --dir pki --role control-plane --name cp
    python examples/control_plane.py pki 127.0.0.1:8443 127.0.0.1:8000

PKI is the directory, LISTEN where workers connect, TARGET what to fetch, as seen from the worker.
"""

import argparse
import asyncio
import contextlib

import konnektor as kk


async def fetch(session: kk.Session, host: str, port: int) -> str:
    """The status line of a page at the worker's side."""
    async with await session.open_tcp(host, port) as stream:
        await stream.send(f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        page = b"".join([chunk async for chunk in stream])
    return page.partition(b"\r\n")[0].decode()


async def main(pki: str, listen: str, target: str) -> None:
    host, _, port = target.rpartition(":")
    tls = kk.TLSFiles(f"{pki}/ca.pem", f"{pki}/cp.pem", f"{pki}/cp.key")
    async with kk.ControlPlane(listen, tls=tls) as control_plane, control_plane.events() as events:
        print(f"listening on {control_plane.address}", flush=True)
        async for event in events:
            match event:
                case kk.WorkerConnected(name, session):
                    print(f"{name} connected", flush=True)
                    try:
                        print(f"{target} by {name}: {await fetch(session, host, int(port))}", flush=True)
                    except kk.KonnektorError as error:
                        print(f"{target} by {name}: {error}", flush=True)
                case kk.WorkerDisconnected(name):
                    print(f"{name} disconnected", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch a page through every worker that connects.")
    parser.add_argument("pki")
    parser.add_argument("listen", metavar="HOST:PORT")
    parser.add_argument("target", metavar="TARGET-HOST:PORT")
    arguments = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(main(arguments.pki, arguments.listen, arguments.target))
    except kk.KonnektorError as error:
        parser.exit(4 if isinstance(error, kk.ListenError) else 1, f"{parser.prog}: {error}\n")
