"""The connection is cut after the N-th byte, for one N after another: nothing is lost, doubled or left behind."""

import asyncio
import hashlib
import random
from contextlib import AsyncExitStack
from itertools import repeat

import pytest

from konnektor.worker import Backoff
from tests.endpoints.parts import PATIENCE, proxied, round_trip, target, until

STREAMS = 8
ROUND = random.Random(1).randbytes(400)


async def run(certs, monkeypatch, cut, span, step):
    """``cut(t, n)`` for every ``step``-th ``n`` below ``span``, each amid transfers on many streams."""
    monkeypatch.setattr("konnektor.worker.Backoff", lambda **_: Backoff(0.001, 0.001))
    grants = {"allow_from": ["node-1=127.0.0.1:*"]}
    async with target() as echo, proxied(certs, plane=grants) as t, AsyncExitStack() as stack:
        ends = (t.session, t.client)
        streams = [
            await stack.enter_async_context(await ends[i % 2].open_tcp("127.0.0.1", echo.port)) for i in range(STREAMS)
        ]
        digests = [(hashlib.sha256(), hashlib.sha256()) for _ in streams]
        for n in range(0, span, step):
            async with asyncio.timeout(PATIENCE):
                before = t.proxy.stats().faults.get("cut_after", 0)
                cut(t, n)
                while True:
                    await asyncio.gather(*map(round_trip, streams, repeat(ROUND), digests))
                    if t.proxy.stats().faults.get("cut_after", 0) > before:
                        break
                    # PINGs and ACKs, too, are bytes.
                    await asyncio.gather(*(end.ping() for end in ends))
                await until(lambda: not any(end.suspended for end in ends))
            for end in ends:
                end._mux.assert_invariants()
                assert end.stream_count == STREAMS, f"after byte {n}"
        assert all(sent.digest() == received.digest() for sent, received in digests)
        assert all(end.stats().resumed >= span // step for end in ends)
        # It came to rest: what was sent is acknowledged, and the replay buffers are empty.
        await until(lambda: not any(end.stats().in_flight for end in ends))
        assert not any(end._mux.resumption.replay._batches for end in ends)
        await stack.aclose()
        await until(lambda: not any(end.stream_count for end in ends))
        assert len(t.proxy) == 1


STEPS = [97, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("to", ["client", "target"])
@pytest.mark.parametrize("step", STEPS)
async def test_of_the_conversation(certs, monkeypatch, to, step):
    """As much as goes through in the first round after the connection is there, and more."""
    await run(certs, monkeypatch, lambda t, n: t.proxy.cut_after(n, to=to), 5_000, step)


@pytest.mark.parametrize("to", ["client", "target"])
@pytest.mark.parametrize("step", STEPS)
async def test_of_the_new_connection(certs, monkeypatch, to, step):
    """Within the TLS handshake, the HELLOs, RESUME and RESUMED, and what is sent again."""

    def cut(t, n):
        t.proxy.cut()
        t.proxy.cut_after(n, to=to)

    await run(certs, monkeypatch, cut, 5_000, step)
