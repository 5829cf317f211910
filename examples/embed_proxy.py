"""A small reverse proxy with a rule of its own: NODE.nodes.example goes to a port at the worker NODE.

    konnektor pki init --dir pki
    konnektor pki issue --dir pki --role control-plane --name cp
    python examples/embed_proxy.py pki 127.0.0.1:8443 127.0.0.1:8080 8000
    curl -H 'Host: node-1.nodes.example' http://127.0.0.1:8080/

Workers connect to the first address, HTTP clients to the second; 8000 is the port that is fetched from each worker.
"""

import argparse
import asyncio
import contextlib

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

import konnektor as kk

SUFFIX = ".nodes.example"


def worker_of(head: bytes) -> str:
    """The rule: which worker a request is for, by its Host header."""
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        host = value.strip().lower().partition(":")[0]
        if name.lower() == "host" and host.endswith(SUFFIX):
            return host.removesuffix(SUFFIX)
    raise kk.NoRouteError(f"write the host as NODE{SUFFIX}")


async def main(pki: str, listen: str, serve: str, port: int) -> None:
    tls = kk.TLSFiles(f"{pki}/ca.pem", f"{pki}/cp.pem", f"{pki}/cp.key")
    async with kk.ControlPlane(listen, tls=tls) as control_plane:

        async def proxy(client: SocketStream) -> None:
            async with client:
                with contextlib.suppress(anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.BrokenResourceError):
                    buffered = BufferedByteReceiveStream(client)
                    head = await buffered.receive_until(b"\r\n\r\n", 16_384) + b"\r\n\r\n"
                    try:
                        stream = await control_plane.open_tcp("127.0.0.1", port, worker=worker_of(head))
                    except kk.KonnektorError as error:
                        await client.send(f"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n{error}\n".encode())
                        return
                    async with stream:
                        await stream.send(head + buffered.buffer)
                        await kk.relay(client, stream)

        host, _, number = serve.rpartition(":")
        try:
            listener = await anyio.create_tcp_listener(local_host=host, local_port=int(number))
        except OSError as error:
            raise kk.ListenError(f"cannot listen on {serve}: {error.strerror}; choose another port") from None
        async with listener:
            local = listener.extra(SocketAttribute.local_port)
            print(f"tunnel {control_plane.address} http {host}:{local}", flush=True)
            await listener.serve(proxy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Route HTTP requests to workers by host name.")
    parser.add_argument("pki")
    parser.add_argument("listen", metavar="HOST:PORT")
    parser.add_argument("serve", metavar="HTTP-HOST:PORT")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(main(arguments.pki, arguments.listen, arguments.serve, arguments.port))
    except kk.KonnektorError as error:
        parser.exit(4 if isinstance(error, kk.ListenError) else 1, f"{parser.prog}: {error}\n")
