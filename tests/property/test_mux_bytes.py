"""Whatever the bytes, and however they are cut."""

from hypothesis import example, given
from hypothesis import strategies as st

from konnektor.errors import Code, SessionClosedError
from konnektor.frames import (
    HEADER,
    Accept,
    Ack,
    Close,
    Credit,
    Data,
    Datagram,
    Goaway,
    Hello,
    Open,
    Ping,
    Pong,
    Priority,
    Refuse,
    Reset,
    Resume,
    Resumed,
    Stop,
    Streams,
    clean_text,
    scan,
)
from tests.pair import Pair

IDS = st.one_of(st.integers(1, 12), st.integers(1, 2**32 - 1))
U8, U32, U64 = st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
CODES = st.one_of(st.sampled_from(list(Code)).map(int), U32)
TEXT = st.text(max_size=40)
PAYLOAD = st.one_of(st.binary(max_size=40), st.integers(0, 20_000).map(bytes))
TLVS = st.dictionaries(st.integers(0, 2**16 - 1), st.binary(max_size=20), max_size=4)
NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
FRAMES = st.one_of(
    st.builds(Data, IDS, st.binary(min_size=1, max_size=40), st.sampled_from([0, 1, 2])),
    st.builds(Open, IDS, st.integers(0, 2), st.just("udp") | NAMES, TLVS),
    st.builds(Accept, IDS, TLVS),
    st.builds(Refuse, IDS, CODES, U32, TEXT),
    st.builds(Reset, IDS, CODES, st.one_of(st.integers(0, 50), U64), TEXT),
    st.builds(Stop, IDS, CODES),
    st.builds(Credit, IDS, st.one_of(st.integers(0, 10**6), U64)),
    st.builds(Streams, st.one_of(st.integers(0, 100), U64)),
    st.builds(Goaway, U32, CODES, U32, TEXT),
    st.builds(Hello, U8, U8, st.binary(min_size=32, max_size=32), TLVS).filter(lambda h: h.vmin <= h.vmax),
    st.builds(Resume, st.binary(min_size=16, max_size=16), U32, U64, st.binary(min_size=32, max_size=32)),
    st.builds(Resumed, U64, st.binary(min_size=32, max_size=32)),
    st.builds(Ack, st.one_of(st.integers(0, 20), U64)),
    st.builds(Ping, U64),
    st.builds(Pong, st.one_of(st.integers(0, 5), U64), U64),
    st.builds(Datagram, IDS, U8, st.binary(max_size=40)),
    st.builds(Close, CODES, TEXT),
    st.builds(Priority, IDS, st.integers(0, 2), st.integers(1, 255)),
)


@given(FRAMES)
def test_decode_gives_back_what_encode_packed(frame):
    [(decoded, _)] = scan(frame.encode())
    if "text" in frame._fields:
        shown = clean_text(frame.text.encode("utf-8", "replace"))
        assert len(decoded.text) == len(shown) or len(shown.encode()) > 200
        frame, decoded = frame._replace(text=""), decoded._replace(text="")
    assert decoded == frame


def cut(data, sizes):
    pos = 0
    for size in sizes:
        if pos >= len(data):
            return
        yield data[pos : pos + size]
        pos += size
    if pos < len(data):
        yield data[pos:]


def conversation(sizes, ops):
    """What two applications see of a few streams, delivered in pieces of ``sizes``."""
    pair = Pair()
    streams = []
    for stream, op, amount in ops:
        if op == "open" or not streams:
            if len(streams) < 8:
                streams.append(pair.client.open())
        elif op == "write":
            for end in ends(pair, streams[stream % len(streams)]):
                if end.sending.name in ("OPEN", "UNSENT") and not end.finish_wanted:
                    end.write(bytes([stream + 1]) * amount)
        elif op == "accept":
            for theirs in pair.server.opened:
                if theirs.sending.name == "UNDECIDED":
                    theirs.accept()
        else:
            target = ends(pair, streams[stream % len(streams)])[amount % 2 - 1]
            if target.sending.name != "UNDECIDED":
                getattr(target, op)()
        pair.pump(sizes)
    seen = []
    for side in pair.sides:
        for stream in side.all:
            kinds = [event for event in stream.sink.events if event[0] != "data"]
            seen.append((stream.id, kinds, bytes(stream.sink.data), stream.receiving, stream.sending))
        assert side.error is None
    return seen


def ends(pair, stream):
    theirs = [s for s in pair.server.opened if s.id == stream.id and stream.id]
    return [stream, *theirs]


OPS = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.sampled_from(["open", "write", "write", "accept", "finish", "reset", "stop", "cancel"]),
        st.one_of(st.integers(0, 50), st.integers(0, 40_000)),
    ),
    max_size=25,
)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=10), OPS)
def test_any_split_of_the_bytes_gives_the_same_events(sizes, ops):
    assert conversation([*sizes, 50_000], ops) == conversation(None, ops)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.binary(max_size=3000)), max_size=60))
def test_any_interleaving_of_streams(writes):
    pair = Pair()
    streams = [pair.open() for _ in range(7)]
    expected = [[b"", b""] for _ in streams]
    for index, who, data in writes:
        streams[index][who].write(data)
        expected[index][who] += data
        if len(data) % 3 == 0:
            pair.pump()
    for both in streams:
        for stream in both:
            stream.finish()
    pair.pump()
    for both, (ours, theirs) in zip(streams, expected, strict=True):
        assert bytes(both[1].sink.data) == ours
        assert bytes(both[0].sink.data) == theirs
        assert all(stream.sink.kinds[-2:] == ["eof", "closed"] for stream in both)
    pair.assert_empty()


def survive(pair, pieces):
    """Garbage ends in a CLOSE at most, never in an exception."""
    rest = b""
    for piece in pieces:
        rest += piece
        rest = rest[pair.server.mux.receive(rest, pair.now) :]
        assert len(rest) <= 8 + 65_535
        pair.server.check()
        pair.server.flush()
    pair.now += 100
    pair.fire(pair.server)
    pair.server.flush()
    sent = [frame for frame, _ in scan(bytes(pair.server.wire))]
    if pair.server.error is not None:
        assert not pair.server.mux.streams
        assert all(stream.sink.is_closed for stream in pair.server.opened)
        assert not any(isinstance(frame, Close) for frame in sent[:-1])


@given(st.binary(max_size=300), st.booleans(), st.lists(st.integers(1, 50), max_size=10))
def test_garbage(data, hello, sizes):
    survive(Pair(hello=hello), cut(data, sizes))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*range(10), *range(0x40, 0x49), 0x80, 0x81, 0xC1]),
            U8,
            IDS | st.just(0),
            st.binary(max_size=80),
        ),
        max_size=15,
    ),
    st.booleans(),
)
def test_sound_headers_with_garbage_behind_them(headers, hello):
    data = b"".join(HEADER.pack(kind, flags & 3, len(body), stream) + body for kind, flags, stream, body in headers)
    survive(Pair(hello=hello), [data])


@example([Goaway(0, 0, 0, ""), Open(1, 0, "udp", {})], ["open"])  # after a GOAWAY nothing is opened
@given(
    st.lists(FRAMES, max_size=30),
    st.lists(
        st.sampled_from(["accept", "refuse", "write", "datagram", "finish", "cancel", "release", "open"]), max_size=30
    ),
)
def test_sound_frames_that_make_no_sense(frames, answers):
    pair = Pair()
    pair.server.auto = False
    todo = iter(answers)
    ids = iter(range(1, 1000, 2))
    # OPENs are given the ids that they should have, or nothing would go far.
    pieces = [(f._replace(stream=next(ids)) if isinstance(f, Open) else f).encode() for f in frames]

    def act(stream):
        match next(todo, None):
            case "accept":
                stream.accept()
            case "refuse":
                stream.refuse(40)
            case "write":
                stream.accept()
                stream.write(b"x" * 20_000)
            case "datagram":
                stream.accept()
                if stream.datagrams is not None:
                    stream.send_datagram(b"x" * 20_000)
            case "finish":
                stream.accept()
                stream.finish()
            case "cancel":
                stream.cancel()
            case "release":
                stream.release()
            case "open":
                try:
                    pair.server.open()
                except SessionClosedError:
                    assert pair.server.mux.draining

    pair.server.on_open = act
    survive(pair, pieces)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60_000), st.integers(1, 40_000)), min_size=1, max_size=40))
def test_no_stall(steps):
    """Whatever was written, and however the reader dawdles: once it reads on, all of it arrives."""
    pair = Pair()
    streams = [pair.open(auto=False) for _ in range(4)]
    total = [0] * 4
    for index, size, read in steps:
        ours, theirs = streams[index]
        ours.write(bytes(size))
        total[index] += size
        pair.pump([4000])
        theirs.consumed(read)
    for _ in range(2000):
        pair.pump()
        if not any(theirs.receive_window.unread for _, theirs in streams):
            break
        for _, theirs in streams:
            theirs.consumed(7000)
    assert [len(theirs.sink.data) for _, theirs in streams] == total
    for ours, theirs in streams:
        ours.cancel()
        theirs.release()
    pair.pump()
    pair.assert_empty()
