"""Frames encoded and decoded: a thousand at a time, so a call's thousands a second are frames' millions."""

from __future__ import annotations

import pytest

from konnektor.frames import Accept, Ack, Credit, Data, Frame, Open, Ping, scan

COUNT = 1000


def of(size: int) -> list[Frame]:
    return [Data(2 * n + 1, bytes(size)) for n in range(COUNT)]


MIXED: list[Frame] = [
    each
    for n in range(COUNT // 10)
    for each in (
        Open(2 * n + 1, 1, "tcp", {1: b"\x82\xa4host\xa9127.0.0.1\xa4port\x50"}), Accept(2 * n + 1), *[Data(2 * n + 1, bytes(100))] * 5,
        Credit(2 * n + 1, 1 << 20), Ack(n), Ping(n),
    )
]  # fmt: skip
SETS = {"64-byte DATA": of(64), "16-KiB DATA": of(16 * 1024), "mixed": MIXED}


@pytest.mark.parametrize("frames", SETS.values(), ids=SETS.keys())
def test_encode_1000(benchmark, frames):
    encoded = benchmark(lambda: [frame.encode() for frame in frames])
    assert len(encoded) == COUNT


@pytest.mark.parametrize("frames", SETS.values(), ids=SETS.keys())
def test_decode_1000(benchmark, frames):
    wire = b"".join(frame.encode() for frame in frames)
    assert benchmark(lambda: sum(1 for _ in scan(wire))) == COUNT
