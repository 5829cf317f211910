"""The Wireshark dissector says of every frame what konnektor's own decoder says.

Captures are written here, packet by packet, so that no test needs a network or a privilege.
"""

import asyncio
import json
import os
import random
import ssl
import struct
import subprocess
import xml.etree.ElementTree as ET
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest

import konnektor as kk
from konnektor import frames
from konnektor.errors import Code
from konnektor.frames import HEADER, HEADER_SIZE, FrameType, HelloTLV, OpenTLV
from konnektor.handshake import AlertingSSLObject
from konnektor.settings import FLOORS, Settings
from konnektor.stream_types import Tcp, Udp
from tests.endpoints.parts import target, unused_port
from tests.tools import needs

ROOT = Path(__file__).parents[2]
LUA = ROOT / "contrib" / "wireshark" / "konnektor.lua"
VECTORS = ROOT / "tests" / "vectors"
PLAIN_PORT, TLS_PORT = 7000, 8443

pytestmark = pytest.mark.needs_tool("tshark")


# -- Captures ---------------------------------------------------------------------------------------------------------


class Capture:
    """A pcap file of TCP connections: each a list of (from the client?, bytes), a packet each."""

    def __init__(self):
        self.packets = []

    def connection(self, segments, port):
        client = 20_000 + len({packet[:2] for packet in self.packets})
        sequence = {True: 1000, False: 9000}
        self._packet(client, port, sequence, True, b"", flags=0x02)
        sequence[True] += 1
        self._packet(client, port, sequence, False, b"", flags=0x12)
        sequence[False] += 1
        for from_client, data in segments:
            for begin in range(0, len(data), 60_000):  # what fits into an IP packet
                self._packet(client, port, sequence, from_client, data[begin : begin + 60_000])
                sequence[from_client] += len(data[begin : begin + 60_000])

    def _packet(self, client, port, sequence, from_client, data, flags=0x18):
        ports = (client, port) if from_client else (port, client)
        addresses = [bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])]
        if not from_client:
            addresses.reverse()
        acknowledged = 0 if flags == 0x02 else sequence[not from_client]
        tcp = struct.pack(">HHIIBBHHH", *ports, sequence[from_client], acknowledged, 0x50, flags, 65535, 0, 0) + data
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, *addresses)
        self.packets.append((client, port, ip + tcp))

    def write(self, path, snap=None):
        """``snap``: bytes of each packet that were captured; all of them if None."""
        with path.open("wb") as file:
            file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262_144, 101))  # LINKTYPE_RAW
            for index, (_, _, packet) in enumerate(self.packets):
                captured = packet[:snap]
                file.write(struct.pack("<IIII", index, 0, len(captured), len(packet)) + captured)


@pytest.fixture
def tshark(tmp_path):
    """Runs tshark on a capture, with the dissector and nothing of the user's own settings."""
    home = tmp_path / "home"
    home.mkdir()

    def run(capture, *options, **kwargs):
        file = tmp_path / "capture.pcap"
        capture.write(file, **kwargs)
        done = subprocess.run(
            [needs("tshark"), "-n", "-r", file, "-X", f"lua_script:{LUA}", *options],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "WIRESHARK_CONFIG_DIR": str(home),
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            timeout=50,
        )
        errors = [line for line in done.stderr.decode().splitlines() if not line.startswith("Running as user")]
        assert (done.returncode, errors) == (0, [])
        output = done.stdout.decode()
        assert "Lua Error" not in output
        return output

    return run


PLAIN = ("-o", f"konnektor.tcp_port:{PLAIN_PORT}")


class Shown:
    """A frame as tshark shows it: every field by its name, in order, and the errors."""

    def __init__(self, element):
        self.line = element.get("show") or element.get("showname", "")
        self.fields = {}
        self.errors = []
        self.notes = []
        for field in element.iter("field"):
            name = field.get("name").removeprefix("konnektor.")
            if name.startswith("error."):
                self.errors.append(name.removeprefix("error.").upper())
            elif field.get("name") in NOTES:
                self.notes.append(name)
            elif field is not element and field.get("name").startswith("konnektor."):
                self.fields.setdefault(name, []).append(field)

    def shows(self, name):
        return [field.get("show") for field in self.fields.get(name, [])]

    def bytes(self, name):
        return [bytes.fromhex(field.get("value")) for field in self.fields.get(name, [])]


NOTES = {
    f"konnektor.{name}" for name in ("unknown_frame", "unknown_tlv", "critical_tlv", "malformed_header", "truncated")
}


def shown(pdml):
    """The frames of each connection and direction: {(connection, from the client?): [Shown, ...]}."""
    found = {}
    for packet in ET.fromstring(pdml).iter("packet"):
        stream = int(packet.find(".//field[@name='tcp.stream']").get("show"))
        from_client = int(packet.find(".//field[@name='tcp.srcport']").get("show")) >= 20_000
        for element in packet.iter("field"):
            if element.get("name") == "konnektor.frame":
                found.setdefault((stream, from_client), []).append(Shown(element))
    return found


# -- What is expected -------------------------------------------------------------------------------------------------

BYTES = {"payload", "nonce", "mac", "session_id"}
BYTE_TLVS = {"instance", "session_id", "resume_key", "resume_intent", "header"}
RENAMED = {"priority": "class"}


def assert_same(frame, seen, raw):
    """``seen`` is what ``frame`` says, decoded by konnektor from ``raw``, and nothing else."""
    kind, flags, length, stream = HEADER.unpack_from(raw)
    header = {"type": kind, "flags": flags, "length": length, "stream": stream}
    assert {name: int(seen.shows(name)[0], 0) for name in header} == header
    assert [seen.shows(f"type.{bit}")[0] for bit in ("ignorable", "unsequenced")] == [
        str(int(bool(kind & bit))) for bit in (frames.IGNORABLE, frames.UNSEQUENCED)
    ]
    expected = {*header, "type.ignorable", "type.unsequenced"}
    if frame is None:
        assert seen.notes == ["unknown_frame"]
        assert seen.bytes("undecoded") == ([bytes(raw[HEADER_SIZE:])] if length else [])
        assert set(seen.fields) - {"undecoded"} == expected
        return
    prefix = type(frame).__name__.lower()
    if prefix == "data":
        assert [seen.shows(f"flags.{bit}")[0] for bit in ("fin", "blocked")] == [str(flags & 1), str(flags >> 1)]
        expected |= {"flags.fin", "flags.blocked"}
    for name, value in frame._asdict().items():
        field = f"{prefix}.{RENAMED.get(name, name)}"
        if name in ("stream", "flags"):
            continue
        if name == "tlvs":
            expected |= tlvs_shown(prefix, value, seen)
        elif name in BYTES:
            assert b"".join(seen.bytes(field)) == value
            expected |= {field} if value else set()
        elif field == "priority.weight":
            assert max(int(*seen.shows(field)), 1) == value
            expected.add(field)
        elif value != "":
            assert seen.shows(field) == [str(value)]
            expected.add(field)
    expected |= {"open.name_length"} if prefix == "open" else set()
    expected |= {"hello.magic", "hello.reserved"} if prefix == "hello" else set()
    assert set(seen.fields) == expected


def tlvs_shown(prefix, tlvs, seen):
    """Checks the TLVs; gives back the names of the fields that must be there."""
    if not tlvs:
        return set()
    field = f"{prefix}.tlv"
    assert [int(tlv) for tlv in seen.shows(f"{field}.id")] == list(tlvs)
    assert [int(size) for size in seen.shows(f"{field}.length")] == [len(value) for value in tlvs.values()]
    expected = {field, f"{field}.id", f"{field}.length"}
    known = HelloTLV if prefix == "hello" else OpenTLV
    unknown = [value for tlv, value in tlvs.items() if value and tlv not in set(known)]
    assert seen.bytes(f"{field}.value") == unknown
    expected |= {f"{field}.value"} if unknown else set()
    for tlv, value in tlvs.items():
        if tlv not in set(known) or not value:
            continue
        name = known(tlv).name.lower()
        if name in ("routes", "labels"):
            name = name[:-1]
            lines = [frames.clean_text(line) for line in value.split(b"\n") if line]
            assert seen.shows(f"{prefix}.{name}") == lines
        elif name in BYTE_TLVS:
            assert seen.bytes(f"{prefix}.{name}") == [value]
        elif name in ("software", "name", "traceparent", "source"):
            assert seen.shows(f"{prefix}.{name}") == [frames.clean_text(value)]
        else:
            assert [int(text, 0) for text in seen.shows(f"{prefix}.{name}")] == [int.from_bytes(value, "big")]
        expected.add(f"{prefix}.{name}")
        if name == "features":
            expected |= {"hello.features.resume", "hello.features.datagrams"}
        for request_type in (Tcp, Udp):
            host, port = (f"open.{request_type.name}.{part}" for part in ("host", "port"))
            if name == "header" and seen.shows(host):
                request = request_type.decode(value)
                assert seen.shows(host) == [frames.clean_text(request.host.encode())]
                assert seen.shows(port) == [str(request.port)]
                expected |= {host, port}
    return expected


def assert_all_same(wire, seen):
    begin, rest = 0, iter(seen)
    for frame, end in frames.scan(wire):
        found = next(rest)
        assert found.errors == []
        assert_same(frame, found, wire[begin:end])
        begin = end
    assert begin == len(wire) and next(rest, None) is None


# -- Vectors ----------------------------------------------------------------------------------------------------------


def unpack(parts):
    return b"".join(bytes.fromhex(p) if isinstance(p, str) else bytes.fromhex(p[0]) * p[1] for p in parts)


def test_vectors(tshark):
    """Each on a connection of its own."""
    good, bad = (json.loads((VECTORS / f"{name}.json").read_text()) for name in ("frames", "errors"))
    capture = Capture()
    for vector in good + bad:
        capture.connection([(True, unpack(vector["bytes"]))], PLAIN_PORT)
    found = shown(tshark(capture, *PLAIN, "-T", "pdml"))
    for index, vector in enumerate(good):
        data = unpack(vector["bytes"])
        [seen] = found[index, True]
        [(frame, _)] = frames.scan(data)
        assert_same(frame, seen, data)
        # This one the session refuses, not the decoder.
        assert seen.errors == (["FLOW_CONTROL"] if vector["name"].startswith("CREDIT beyond") else []), vector["name"]
    for index, vector in enumerate(bad, len(good)):
        data = unpack(vector["bytes"])
        if "max_frame" in vector:  # what the peer has declared is not kept: such a frame is whole when it has ended
            assert (index, True) not in found
            continue
        [seen] = found[index, True]
        assert seen.errors[0] == vector["error"], vector["name"]
        assert int(seen.shows("type")[0], 0) == data[0]


# -- Frames in pieces -------------------------------------------------------------------------------------------------


def in_pieces(wire, rng, most):
    """Both sides say ``wire``, at the same time, in pieces: (from the client?, bytes)."""
    rest = {True: wire, False: wire}
    while sides := [side for side in rest if rest[side]]:
        side = rng.choice(sides)
        size = rng.choice([1, HEADER_SIZE, most, rng.randrange(1, most)])
        yield side, rest[side][:size]
        rest[side] = rest[side][size:]


def wire_of(longest):
    """The frames of all vectors up to a length, one after the other."""
    vectors = json.loads((VECTORS / "frames.json").read_text())
    whole = [unpack(vector["bytes"]) for vector in vectors if "beyond" not in vector["name"]]
    return b"".join(data for data in whole if len(data) <= longest)


def tls_connection(certs, said):
    """The segments of a TLS connection: each of ``said``, (from the client?, bytes), as one record."""
    client, server = certs.worker().client_context(), certs.plane.server_context()
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        True: client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        False: server.wrap_bio(to_server, to_client, server_side=True),
    }
    written = {True: to_server, False: to_client}
    segments = []

    def carry(from_client):
        # A memory BIO is a file that both ends use: what was written is what the capture sees, and goes back in.
        data = written[from_client].read()
        written[from_client].write(data)
        if data:
            segments.append((from_client, data))

    for from_client in (True, False, True, False):
        with suppress(ssl.SSLWantReadError):
            ends[from_client].do_handshake()
        carry(from_client)
    for from_client, data in said:
        ends[from_client].write(data)
        carry(from_client)
        assert ends[not from_client].read(len(data)) == data
    return segments


def test_frames_in_pieces(tshark, certs, tmp_path, monkeypatch):
    """A frame may come in any number of TCP segments and TLS records, and several in one."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    rng = random.Random(4711)
    capture, wires = Capture(), []
    for longest, most in ((300, 10), (300, 100), (10_000, 3000)):
        wire = wire_of(longest)
        said = list(in_pieces(wire, rng, most))
        capture.connection(said, PLAIN_PORT)
        capture.connection(tls_connection(certs, said), TLS_PORT)
        wires += [wire, wire]
    keys = f"tls.keylog_file:{tmp_path / 'keys'}"
    found = shown(tshark(capture, *PLAIN, "-o", keys, "-T", "pdml"))
    for index, wire in enumerate(wires):
        for from_client in (True, False):
            assert_all_same(wire, found[index, from_client])


# -- A session --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def relay(port, segments):
    """A port that leads to ``port``; what passes is kept in ``segments``."""

    async def pump(from_client, reader, writer):
        while data := await reader.read(65_536):
            segments.append((from_client, data))
            writer.write(data)
        writer.close()

    async def accepted(reader, writer):
        onward = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(True, reader, onward[1]), pump(False, onward[0], writer))
        done.set()

    done = asyncio.Event()
    async with await asyncio.start_server(accepted, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await done.wait()


async def test_a_session(tshark, certs, tmp_path, monkeypatch, caplog):
    """Two endpoints behind a relay: what they said inside TLS is what tshark finds with the key log."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    said, segments = {True: b"", False: b""}, []
    write = AlertingSSLObject.write

    def recorded(self, data):
        count = write(self, data)
        said[not self.server_side] += bytes(data[:count])
        return count

    monkeypatch.setattr(AlertingSSLObject, "write", recorded)
    async with (
        target() as echo,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane,
        relay(int(plane.address.rsplit(":")[-1]), segments) as port,
    ):
        allow = [kk.parse_allow(f"127.0.0.1:{echo.port}")]
        async with kk.Worker([f"127.0.0.1:{port}"], tls=certs.worker(), allow=allow, labels={"zone": "a"}) as worker:
            session = await plane.wait_for("node-1")
            await worker.wait_connected()
            async with await session.open_tcp("127.0.0.1", echo.port) as stream:
                for size in (1, 100_000):
                    await stream.send(b"x" * size)
                    left = size
                    while left:
                        left -= len(await stream.receive())
                await stream.send_eof()
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            with pytest.raises(kk.DeniedError):
                await session.open_tcp("127.0.0.1", unused_port())
    caplog.clear()  # the record of the refusal holds its error, and that a context with its key log
    capture = Capture()
    capture.connection(segments, TLS_PORT)
    found = shown(tshark(capture, "-o", f"tls.keylog_file:{tmp_path / 'keys'}", "-T", "pdml"))
    for from_client in (True, False):
        assert_all_same(said[from_client], found[0, from_client])
    lines = [seen.line for seen in found[0, False]]
    assert f"OPEN[2] tcp 127.0.0.1:{echo.port}" in lines and "DATA[2] 1" in lines and "DATA[2] 0 FIN" in lines
    assert any(line.startswith("REFUSE[4] DENIED") for line in (seen.line for seen in found[0, True]))


# -- What stands in the list of packets -------------------------------------------------------------------------------


def test_the_info_column_and_decode_as(tshark, certs, tmp_path, monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    header = Tcp(host="db.example", port=5432).encode()
    first = frames.Open(1, 1, "tcp", {1: header}).encode() + frames.Data(1, b"x" * 512, 1).encode()
    second = frames.Reset(1, Code.CANCELLED, 7, "a\nb\x9b").encode()
    third = frames.Open(3, 0, "tcp", {1: Tcp(host="::1", port=80).encode()}).encode() + b"\x09\0\0\0\0\0\0\0"
    capture = Capture()
    capture.connection([(True, first), (True, second), (True, third)], 7777)
    said = tls_connection(certs, [(True, first), (True, second)])
    capture.connection([*said[:-2], (True, said[-2][1] + said[-1][1])], TLS_PORT)
    decode = ("-d", "tcp.port==7777,konnektor", "-o", f"tls.keylog_file:{tmp_path / 'keys'}")
    lines = tshark(capture, *decode, "-Y", "konnektor", "-T", "fields", "-e", "_ws.col.Info").splitlines()
    assert lines == [
        "OPEN[1] tcp db.example:5432, DATA[1] 512 FIN",
        "RESET[1] CANCELLED at 7: a?b?",
        "OPEN[3] tcp [::1]:80, 0x09 (PROTOCOL)",
        "OPEN[1] tcp db.example:5432, DATA[1] 512 FIN, RESET[1] CANCELLED at 7: a?b?",
    ]


def test_filters_of_the_readme(tshark):
    text = (LUA.parent / "README.md").read_text()
    capture = Capture()
    capture.connection([(True, wire_of(300))], PLAIN_PORT)
    filters = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `konnektor")]
    assert filters
    any_of = " or ".join(f"({one})" for one in filters)
    assert len(tshark(capture, *PLAIN, "-Y", any_of).splitlines()) == 1


# -- What is wrong in a frame of its own ------------------------------------------------------------------------------


def hello(**changed):
    tlvs = Settings.of(kk.Limits(), name="w", instance=b"i" * 16).to_tlvs()
    tlvs.update({HelloTLV[name]: value for name, value in changed.items()})
    return frames.Hello(1, 1, b"n" * 32, tlvs)


@pytest.fixture(scope="module")
def odd_frames():
    """Frames, with the errors and the notes that they are to be shown with."""
    u32 = lambda value: value.to_bytes(4, "big")
    opened = lambda tlvs, name="tcp": frames.Open(1, 1, name, tlvs)
    return [
        (hello(), [], []),
        *((hello(**{name: u32(floor)}), [], []) for name, floor in FLOORS_ON_THE_WIRE),
        *((hello(**{name: u32(floor - 1)}), ["PROTOCOL"], []) for name, floor in FLOORS_ON_THE_WIRE),
        (hello(INITIAL_STREAMS=b""), ["PROTOCOL"], []),
        (hello(IDLE_TIMEOUT=b"123"), ["PROTOCOL"], []),
        (hello(FEATURES=u32(3), SOFTWARE=b"a\xff\x1b", ROUTES=b"default\n\nhost=\x07", LABELS=b""), [], []),
        (hello(INSTANCE=b"short"), ["PROTOCOL"], []),
        (hello(SESSION_ID=b"s" * 16, RESUME_KEY=b"k" * 32, RESUME_INTENT=b""), [], []),
        (frames.Hello(1, 1, b"n" * 32, {0x1A2A: b"x", 0x300: b"", 0x301: b"y"}), [], ["unknown_tlv"] * 2),
        (frames.Streams(2**31 + 1), ["PROTOCOL"], []),
        (frames.Streams(2**31), [], []),
        (frames.Credit(1, 2**63 - 1), [], []),
        (frames.Credit(1, 2**63), ["FLOW_CONTROL"], []),
        (opened({5: b"x", 8: b"y"}), [], ["critical_tlv", "unknown_tlv"]),
        (frames.Accept(1, {5: b"x"}), [], ["critical_tlv"]),
        (opened({2: b"12345"}), ["PROTOCOL"], []),
        (opened({1: b"\x91"}, "other@x"), [], []),
        (opened({1: b""}, "other@x"), [], []),
        *((opened({1: raw}), [], ["malformed_header"]) for raw in BAD_HEADERS),
        *((opened({1: raw}), [], []) for raw in GOOD_HEADERS),
        (opened({1: Udp("::1", 53).encode()}, "udp"), [], []),
        (opened({1: b"\x80"}, "udp"), [], ["malformed_header"]),
    ]


FLOORS_ON_THE_WIRE = [
    ("MAX_FRAME", FLOORS.max_frame),
    ("INITIAL_WINDOW", FLOORS.initial_window),
    ("INITIAL_STREAMS", FLOORS.initial_streams),
    ("IDLE_TIMEOUT", int(FLOORS.idle_timeout * 1000)),
]
HOST = b"\xa4host\xa1h"
BAD_HEADERS = [
    b"\x80",
    b"\xc1",
    b"\x92\xa4host\xa1h",
    b"\x82" + HOST,
    b"\x82" + HOST + b"\xa4port\x00",
    b"\x82" + HOST + b"\xa4port\xd0\xff",
    b"\x82" + HOST + b"\xa4port\xce\x00\x01\x00\x00",
    b"\x82" + HOST + b"\xa4port\xcd\x01",
    b"\x82" + HOST + b"\xa4port\xa11",
    b"\x82" + HOST + b"\xa4port\x01\x00",
    b"\x82\xa4host\xa0\xa4port\x01",
    b"\x82\x01\x02" + HOST,
    b"\xdf\xff\xff\xff\xff",
    b"\x81\xa1x" + b"\x91" * 5000,
    b"\x81\xa1x\xc6\xff\xff\xff\xff",
]
GOOD_HEADERS = [
    b"\x82" + HOST + b"\xa4port\xd1\x1f\x90",
    b"\xde\x00\x02\xd9\x04port\xcf" + bytes(6) + b"\x1f\x90\xda\x00\x04host\xdb\x00\x00\x00\x02\xc3\xa4",
    # A key that is not known, of each kind of value and with a map in it.
    b"\x83" + HOST + b"\xa4port\x50\xa1x\xdc\x00\x11\xc0\xc2\xc3\xca1234\xcb12345678\xd01\xd112\xd21234\xd312345678"
    b"\xe0\xc4\x01a\xc7\x01ab\xd4ab\xd8a0123456789abcdef\x81\x01\x90\xdd\x00\x00\x00\x00\xdf\x00\x00\x00\x00",
]


def test_odd_frames(tshark, odd_frames):
    capture = Capture()
    for frame, _, _ in odd_frames:
        capture.connection([(True, frame.encode())], PLAIN_PORT)
    found = shown(tshark(capture, *PLAIN, "-T", "pdml"))
    for index, (frame, errors, notes) in enumerate(odd_frames):
        [seen] = found[index, True]
        assert (seen.errors, seen.notes) == (errors, notes), frame
        if not errors:
            raw = frame.encode()
            assert_same(frame, seen, raw)
            if raw[0] == FrameType.OPEN and frame.name in ("tcp", "udp") and 1 in frame.tlvs:
                assert (f"open.{frame.name}.host" in seen.fields) is not bool(notes)


def test_codes_have_their_names(tshark):
    codes = [*Code, 31, 99, 2**31, 2**32 - 1]
    capture = Capture()
    capture.connection([(True, b"".join(frames.Stop(1, code).encode() for code in codes))], PLAIN_PORT)
    lines = [seen.line for seen in shown(tshark(capture, *PLAIN, "-T", "pdml"))[0, True]]
    named = {31: "unknown code 31", 99: "unknown code 99"}
    for code, line in zip(codes, lines, strict=True):
        name = code.name if isinstance(code, Code) else named.get(code, f"application code {code}")
        assert line == f"STOP[1] {name}"


def test_headers_that_are_wrong_more_than_once(tshark):
    """A length that does not fit is not read by, even where another rule is named first."""
    wrong = [HEADER.pack(kind, 0x80, size, 0) + bytes(size) for kind in FrameType for size in (0, 1, 3, 300)]
    capture = Capture()
    capture.connection([(True, b"".join(wrong))], PLAIN_PORT)
    seen = shown(tshark(capture, *PLAIN, "-T", "pdml"))[0, True]
    for data, one in zip(wrong, seen, strict=True):
        with pytest.raises(kk.ProtocolError) as caught:
            list(frames.scan(data))
        assert one.errors[0] == caught.value.code.name


def garbage(rng):
    """What may look like frames: a vector with some of its bytes changed, or noise."""
    vectors = json.loads((VECTORS / "frames.json").read_text())
    whole = [data for data in (unpack(vector["bytes"]) for vector in vectors) if len(data) < 300]
    for _ in range(500):
        data = bytearray(rng.choice(whole) if rng.random() < 0.8 else rng.randbytes(rng.randrange(1, 60)))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        yield bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])


def test_garbage(tshark):
    """The dissector errs where the decoder errs, and nothing makes the script fail."""
    capture, said = Capture(), list(garbage(random.Random(1)))
    for data in said:
        capture.connection([(True, data)], PLAIN_PORT)
    found = shown(tshark(capture, *PLAIN, "-T", "pdml"))
    for index, data in enumerate(said):
        seen, decoded = found.get((index, True), []), []
        try:
            decoded.extend(frame for frame, _ in frames.scan(data))
        except kk.ProtocolError as error:
            # A receiver reads no further; the dissector does.
            assert error.code.name in seen[len(decoded)].errors
        else:
            assert len(seen) == len(decoded)
        for frame, one in zip(decoded, seen, strict=False):
            assert one.errors == [] or isinstance(frame, frames.Hello | frames.Open | frames.Credit | frames.Streams)


def test_a_capture_of_the_beginnings_of_packets(tshark):
    capture = Capture()
    for data in garbage(random.Random(2)):
        capture.connection([(True, data)], PLAIN_PORT)
    for frame in (frames.Data(1, b"x" * 100), frames.Close(0)):
        capture.connection([(True, frame.encode())], PLAIN_PORT)
    found = shown(tshark(capture, *PLAIN, "-T", "pdml", snap=64))
    *_, [cut], [whole] = found.values()
    assert cut.notes == ["truncated"] and cut.bytes("undecoded") == [b"x" * 16]
    assert whole.notes == [] and whole.line == "CLOSE NO_ERROR"
