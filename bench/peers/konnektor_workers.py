"""Many workers in one process: ``python -P bench/peers/konnektor_workers.py HOST:PORT PKI COUNT``."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import konnektor as kk
from konnektor import runtime

POLL = 0.02
"""Seconds between looks at who is connected."""


async def keep_up(address: str, folder: Path, count: int) -> None:
    # A context each, 5 ms of checks and a rehearsal: what a worker does once, on its own machine, before it dials. So it is here,
    # too: no figure has it. The Go peers' workers share one, which was made before as well.
    files = [kk.TLSFiles(folder / "ca.pem", folder / f"w{n}.pem", folder / f"w{n}.key") for n in range(count)]
    workers = [kk.Worker([address], tls=each, server_name="127.0.0.1") for each in files]
    gc.freeze()
    since = time.monotonic()
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        while True:
            missing = workers
            while missing:  # only those: looking at a thousand each time would slow them down
                await asyncio.sleep(POLL)
                missing = [worker for worker in missing if not worker.sessions]
            print(f"connected {count} in {time.monotonic() - since:.6f} s", flush=True)
            while workers[0].sessions:  # noqa: ASYNC110 there is no event for it
                await asyncio.sleep(POLL)
            since = time.monotonic()


if __name__ == "__main__":
    runtime.run(keep_up(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
