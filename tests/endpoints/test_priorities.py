"""Class and weight over real sessions: by rule at either end, and by call; told by the order of the bytes."""

import asyncio
from contextlib import asynccontextmanager

import pytest

import konnektor as kk
from konnektor.priorities import CLASSES
from tests.endpoints.parts import PATIENCE, Process, connection, flags, target, tunnel, until

SIZE = 4 * 2**20
ROOMY = kk.Limits(initial_window=SIZE, initial_streams=8, receive_pool=64 * 2**20, send_queue=SIZE)
"""Neither credit nor the streams' queues hold anything back: the order is the scheduler's alone."""

FIRST, SECOND = 7001, 7002


@asynccontextmanager
async def ends(certs, *, plane=(), worker=(), **kwargs):
    """Two accepted streams to two ports, by name, at both ends; nothing is dialed."""
    async with tunnel(certs, plane={"priorities": plane, "limits": ROOMY}, priorities=worker, limits=ROOMY) as t:
        theirs, done = {}, asyncio.Event()
        t.worker.handlers.remove(kk.Tcp)

        @t.worker.handle(kk.Tcp)
        async def serve(stream, request):
            await stream.accept()
            theirs[request.port] = stream
            await done.wait()

        ours = {port: await t.session.open_tcp("127.0.0.1", port, **kwargs) for port in (FIRST, SECOND)}
        try:
            await until(lambda: len(theirs) == 2)
            yield ours, theirs
        finally:
            for stream in ours.values():
                stream.reset()
            done.set()


def known(streams):
    return [(streams[port].priority, streams[port].weight) for port in (FIRST, SECOND)]


async def agreed(sides, *expected):
    await until(lambda: all(known(streams) == list(expected) for streams in sides))


class Noted:
    """A stream's sink, whose bytes are counted as they come off the wire."""

    def __init__(self, sink, count, port):
        self._sink, self._count, self._port = sink, count, port

    def __getattr__(self, name):
        return getattr(self._sink, name)

    def data_received(self, data):
        self._count[self._port] += len(data)
        if self._count[SECOND] == SIZE:
            self._count.setdefault("then", self._count[FIRST])
        self._sink.data_received(data)


async def arrived(senders, receivers):
    """Both streams have ``SIZE`` to send, the first one first: of the first, how much is here when all of the second is?"""
    count = dict.fromkeys(receivers, 0)
    for port, stream in receivers.items():
        stream._mux.sink = Noted(stream._mux.sink, count, port)

    async def read(port):
        left = SIZE
        while left:
            left -= len(await receivers[port].receive(2**20))

    async with asyncio.timeout(PATIENCE):
        readers = [asyncio.create_task(read(port)) for port in (FIRST, SECOND)]
        for port in (FIRST, SECOND):
            await senders[port].send(bytes(SIZE))  # no turn of the loop in between
        await asyncio.gather(*readers)
    for stream in receivers.values():
        stream._mux.sink = stream._mux.sink._sink
    return count["then"]


# A stream may send 64 KiB before it is taken for bulky, and overdraw each turn by a frame of 64 KiB.
SLACK = 256 * 1024


@pytest.mark.parametrize("end", ["plane", "worker"])
@pytest.mark.parametrize(
    ("first", "second", "share"),
    [("bulk", "interactive", 1 / 8), ("default", "default:6", 1 / 6), ("bulk:3", "default:3", 1 / 4)],
)
async def test_a_rule_at_either_end_holds_for_both_directions(certs, end, first, second, share):
    rules = [f"*:{FIRST}={first}", f"127.0.0.0/8:{SECOND}={second}"]
    async with ends(certs, **{end: rules}) as (ours, theirs):
        expected = []
        for text in (first, second):
            name, _, weight = text.partition(":")
            expected.append((CLASSES.index(name), int(weight or 1)))
        await agreed((ours, theirs), *expected)
        for senders, receivers in ((ours, theirs), (theirs, ours)):
            others = await arrived(senders, receivers)
            assert abs(others - SIZE * share) < SLACK, others
            assert others, "starved"


async def test_without_rules_the_first_is_done_first_or_both_alike(certs):
    async with ends(certs) as (ours, theirs):
        for senders, receivers in ((ours, theirs), (theirs, ours)):
            assert await arrived(senders, receivers) > SIZE - SLACK


async def test_with_rules_at_both_ends_each_decides_for_itself(certs):
    plane, worker = (f"*:{FIRST}=bulk:2", f"*:{SECOND}=interactive"), (f"*:{FIRST}=interactive:3", f"*:{SECOND}=bulk")
    async with ends(certs, plane=plane, worker=worker) as (ours, theirs):
        assert known(ours) == [(2, 2), (0, 1)] and known(theirs) == [(0, 3), (2, 1)]
        assert abs(await arrived(ours, theirs) - SIZE / 4) < SLACK
        # What each asked of the other has arrived, and changed nothing.
        assert known(ours) == [(2, 2), (0, 1)] and known(theirs) == [(0, 3), (2, 1)]
        assert await arrived(theirs, ours) > SIZE - SLACK


async def test_by_call(certs):
    async with ends(certs, plane=[f"*:{FIRST}=bulk"], priority=0, weight=9) as (ours, theirs):
        await agreed((ours, theirs), (0, 9), (0, 9))  # what is said comes before rules
        ours[FIRST].set_priority(2)
        theirs[SECOND].set_priority(1, 2)
        await agreed((ours, theirs), (2, 1), (1, 2))
        assert abs(await arrived(ours, theirs) - SIZE / 8) < SLACK
        with pytest.raises(kk.LocalProtocolError):
            ours[FIRST].set_priority(3)
        for wrong in ({"priority": 3}, {"weight": 0}, {"weight": 256}):
            with pytest.raises(kk.LocalProtocolError):
                await ours[FIRST].session.open_tcp("127.0.0.1", FIRST, **wrong)
        assert ours[FIRST].session.stream_count == 2


async def test_forwards_and_workers_own_streams(certs):
    """Whatever opens a stream, of either end, the rules are for it."""
    async with (
        target() as echo,
        tunnel(
            certs,
            plane={"priorities": [f"*:{echo.port}=interactive:5"], "allow_from": [f"node-1=127.0.0.1:{echo.port}"]},
        ) as t,
    ):
        worker = t.worker.sessions[0]

        def classes():
            return [{(s.priority, s.weight) for s in end._mux.streams.values()} for end in (t.session, worker)]

        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            await until(lambda: classes() == [{(0, 5)}, {(0, 5)}])
        async with await worker.open_tcp("127.0.0.1", echo.port) as stream:
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            await until(lambda: classes() == [{(0, 5)}, {(0, 5)}])


@asynccontextmanager
async def process(tmp_path, *arguments):
    """An endpoint of the command line, and what its ready line says."""
    with Process(tmp_path / "log", *arguments) as running:
        async with asyncio.timeout(PATIENCE):
            yield running, await asyncio.to_thread(running.ready)
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0, running.log.read_text()


async def test_the_flag_of_a_worker(certs, tmp_path):
    async with target() as echo, kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        arguments = ["--connect", plane.address, *flags(certs.worker()), "--allow", f"127.0.0.1:{echo.port}"]
        rules = ["--priority", f"*:{echo.port}=interactive:5", "--priority", "*:*=bulk"]
        async with process(tmp_path, "worker", *arguments, *rules):
            stream = await plane.get("node-1").open_tcp("127.0.0.1", echo.port)
            await until(lambda: (stream.priority, stream.weight) == (0, 5))
            await stream.aclose()


async def test_the_flags_of_a_control_plane(certs, tmp_path):
    async with target() as echo:
        arguments = [
            "--listen",
            "127.0.0.1:0",
            *flags(certs.plane),
            "--forward",
            f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}",
        ]
        more = ["--priority", f"127.0.0.0/8:{echo.port}=bulk:3", "--memory", "80MiB"]
        async with process(tmp_path, "control-plane", *arguments, *more) as (running, ready):
            (where,), (forward,) = ready["tunnel"], ready["forward"]
            allow = [kk.tcp("127.0.0.1", echo.port)]
            async with kk.Worker([where], tls=certs.worker(), allow=allow) as worker:
                session = await worker.wait_connected()
                async with connection(forward.partition("->")[0]) as (reader, writer):
                    writer.write(b"x")
                    assert await reader.readexactly(1) == b"x"
                    await until(lambda: [(s.priority, s.weight) for s in session._mux.streams.values()] == [(2, 3)])
                async with kk.Worker([where], tls=certs.worker("node-2"), once=True) as another:
                    with pytest.raises(kk.HandshakeError, match="no memory is left for another session"):
                        await another.wait_connected()
                await until(lambda: "its session would exceed the memory of 80MiB for all" in running.log.read_text())
