"""A long path between two ends: ``python -m bench.link 127.0.0.1:8443 --listen 127.0.0.1:9443 --round-trip 0.05``."""

from __future__ import annotations

import argparse
import asyncio

from konnektor import runtime
from konnektor.limits import MIB
from konnektor.testing import delaying_relay

__all__ = ["queue"]


def queue(round_trip: float, rate: float | None) -> int:
    """Bytes under way at most: without a rate TCP's own buffers are the queue, with one it is a tenth of a second."""
    return 256 * MIB if rate is None else int(rate * (round_trip / 2 + 0.1))


async def carry(target: str, listen: str, round_trip: float, rate: float | None) -> None:
    async with delaying_relay(target, round_trip, listen=listen, rate=rate, buffer=queue(round_trip, rate)):
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.link", description=__doc__)
    parser.add_argument("target", help="HOST:PORT")
    parser.add_argument("--listen", required=True, help="HOST:PORT")
    parser.add_argument("--round-trip", type=float, required=True, help="seconds")
    parser.add_argument("--rate", type=float, help="bytes a second")
    args = parser.parse_args()
    runtime.run(carry(args.target, args.listen, args.round_trip, args.rate))


if __name__ == "__main__":
    main()
