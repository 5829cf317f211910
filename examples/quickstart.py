"""Streams in one process: no certificates, no ports.

    python examples/quickstart.py

memory_session_pair() joins two sessions as a worker and a control plane would be; the rest is as over a network.
"""

import asyncio

import konnektor as kk
from konnektor.testing import memory_session_pair


async def shout(stream: kk.Stream, request: kk.Tcp) -> None:
    """What the worker serves: not a real connection here, but something that answers."""
    if request.port != 7:
        await stream.reject(kk.Code.DENIED, "only port 7 here")
        return
    await stream.accept()  # from now on data flows both ways
    async for chunk in stream:  # ends with the peer's EOF
        await stream.send(chunk.upper())


async def main() -> None:
    async with memory_session_pair() as (worker, control_plane):
        worker.handlers.add(kk.Tcp, shout)

        # A stream is an anyio byte stream. EOF goes one way, the answer still comes the other.
        async with await control_plane.open_tcp("shouter", 7) as stream:
            await stream.send(b"hello, ")
            await stream.send(b"world")
            await stream.send_eof()
            print(b"".join([chunk async for chunk in stream]).decode())

        # The same stream as asyncio's reader and writer.
        reader, writer = (await control_plane.open_tcp("shouter", 7)).as_asyncio()
        writer.write(b"one line\n")
        print((await reader.readline()).decode().strip())
        writer.close()
        await writer.wait_closed()

        # A refusal is one exception, of the class that belongs to its code.
        try:
            await control_plane.open_tcp("shouter", 22)
        except kk.DeniedError as error:
            print(f"refused: {error}")

        print(f"round trip below a second: {await control_plane.ping() < 1}")


if __name__ == "__main__":
    asyncio.run(main())
