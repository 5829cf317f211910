"""The wire format: every frame, flag and TLV of version 1, encoded and decoded.

A frame is an 8-byte header, big-endian, and a payload::

     0               1               2               3
    +---------------+---------------+-------------------------------+
    |     type      |     flags     |            length             |
    +---------------+---------------+-------------------------------+
    |                            stream                             |
    +---------------------------------------------------------------+
    |                     payload (length bytes)                    |

Stream 0 is the session itself. In ``type``, bit 0x80 means "skip it if you do not know it" and
bit 0x40 "not counted for acknowledgement and resume".

Decoding works in place on whatever buffer the transport filled: ``HEADER.unpack_from`` at an
offset, then ``decode`` on a slice. Nothing is copied; the payload of DATA is the slice itself.
Each frame class has ``encode()``; what it packs, ``decode`` gives back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum, IntFlag
from struct import Struct
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from konnektor.errors import FrameSizeError, ProtocolError

__all__ = [
    "HEADER",
    "HEADER_SIZE",
    "IGNORABLE",
    "MAGIC",
    "MAX_HELLO",
    "MAX_OFFSET",
    "MAX_OPEN",
    "MAX_OPENS",
    "MAX_PAYLOAD",
    "MAX_TEXT",
    "OPEN_DEADLINE",
    "OPEN_HEADER",
    "UNSEQUENCED",
    "VERSION",
    "Accept",
    "Ack",
    "Close",
    "Credit",
    "Data",
    "DataFlag",
    "Datagram",
    "Feature",
    "Frame",
    "FrameType",
    "Goaway",
    "Hello",
    "HelloTLV",
    "Open",
    "OpenTLV",
    "Ping",
    "Pong",
    "Priority",
    "Refuse",
    "Reset",
    "Resume",
    "Resumed",
    "Stop",
    "Streams",
    "clean_text",
    "data_header",
    "decode",
    "decode_tlvs",
    "encode_tlvs",
    "is_grease",
    "is_type_name",
    "read",
    "scan",
]

VERSION: Final = 1
MAGIC: Final = b"KNK1"
HEADER: Final = Struct(">BBHI")
HEADER_SIZE: Final = HEADER.size
IGNORABLE: Final = 0x80
UNSEQUENCED: Final = 0x40

MAX_PAYLOAD: Final = 0xFFFF
MAX_HELLO: Final = 4096
MAX_OPEN: Final = 8192
MAX_TEXT: Final = 200
MAX_OFFSET: Final = 2**63 - 1
"""Highest stream offset; a grant beyond it is FLOW_CONTROL. No stream lives to see it."""
MAX_OPENS: Final = 2**31
"""Highest count a STREAMS frame may carry: there are no more stream ids."""

Buffer: TypeAlias = bytes | bytearray | memoryview


class FrameType(IntEnum):
    """The ``type`` byte."""

    DATA = 0x00
    OPEN = 0x01
    ACCEPT = 0x02
    REFUSE = 0x03
    RESET = 0x04
    STOP = 0x05
    CREDIT = 0x06
    STREAMS = 0x07
    GOAWAY = 0x08
    HELLO = 0x40
    RESUME = 0x41
    RESUMED = 0x42
    ACK = 0x43
    PING = 0x44
    PONG = 0x45
    DATAGRAM = 0x46
    CLOSE = 0x47
    PRIORITY = 0x80


class DataFlag(IntFlag):
    """Flags of DATA; no other frame has any."""

    FIN = 1
    BLOCKED = 2


class Feature(IntFlag):
    """Bits of the HELLO setting ``features``."""

    RESUME = 1
    DATAGRAM = 2


class HelloTLV(IntEnum):
    """Ids of HELLO's settings. Unknown ids are skipped; duplicates are PROTOCOL."""

    MAX_FRAME = 1
    INITIAL_WINDOW = 2
    INITIAL_STREAMS = 3
    IDLE_TIMEOUT = 4
    FEATURES = 5
    SOFTWARE = 6
    INSTANCE = 7
    NAME = 8
    ROUTES = 9
    LABELS = 10
    SESSION_ID = 11
    RESUME_KEY = 12
    RESUME_INTENT = 13
    AFRESH = 14


OPEN_HEADER: Final = 1
OPEN_DEADLINE: Final = 2


class OpenTLV(IntEnum):
    """Ids of OPEN's and ACCEPT's parameters. An unknown odd id is critical, an even one is skipped.

    For what is done for every stream, ``OPEN_HEADER`` and ``OPEN_DEADLINE`` are the plain numbers.
    """

    HEADER = OPEN_HEADER
    DEADLINE = OPEN_DEADLINE
    TRACEPARENT = 4
    SOURCE = 6


# Plain ints for the hot paths: comparing with an IntEnum member costs ten times as much.
_DATA, _OPEN, _ACCEPT, _REFUSE, _RESET, _STOP, _CREDIT, _STREAMS, _GOAWAY = (int(FrameType(n)) for n in range(9))
_HELLO, _RESUME, _RESUMED, _ACK, _PING, _PONG, _DATAGRAM, _CLOSE = (int(FrameType(n)) for n in range(0x40, 0x48))
_PRIORITY = int(FrameType.PRIORITY)
_FIN, _BLOCKED = int(DataFlag.FIN), int(DataFlag.BLOCKED)

_U32 = Struct(">I")
_U32_U32 = Struct(">II")
_U64 = Struct(">Q")
_U64_U64 = Struct(">QQ")
_RESET_BODY = Struct(">IQ")
_GOAWAY_BODY = Struct(">III")
_HELLO_BODY = Struct(">4sBBH32s")
_RESUME_BODY = Struct(">16sIQ32s")
_RESUMED_BODY = Struct(">Q32s")
_TLV_HEADER: Final = 4
_CREDIT_FRAME = Struct(">BBHIQ")

data_header: Final[Callable[[int, int, int, int], bytes]] = HEADER.pack
"""``data_header(FrameType.DATA, flags, length, stream)``: the 8 bytes in front of a DATA payload."""


# Text

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def clean_text(raw: Buffer) -> str:
    """Text of a peer, fit for a log line: C0, C1 and DEL become ``?``, bad UTF-8 the replacement character."""
    return _CONTROL.sub("?", str(raw, "utf-8", "replace"))


def _encode_text(text: str) -> bytes:
    """At most MAX_TEXT bytes, cut between characters."""
    return text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore").encode()


def is_type_name(name: str) -> bool:
    """Whether ``name`` may name a stream type: printable ASCII without spaces, so that it is fit for logs."""
    return 0 < len(name) <= 255 and name.isascii() and name.isprintable() and " " not in name


# TLVs


def is_grease(tlv_id: int) -> bool:
    """Whether a TLV id is of the form 0x?A?A, reserved so that peers learn to skip (RFC 8701's idea)."""
    return tlv_id & 0x0F0F == 0x0A0A


def encode_tlvs(tlvs: Mapping[int, bytes]) -> bytes:
    """``id:u16 len:u16 value`` for each, in the mapping's order."""
    encoded = b""
    for tlv_id, value in tlvs.items():
        encoded += tlv_id.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value
    return encoded


def decode_tlvs(raw: Buffer) -> dict[int, bytes]:
    """The TLVs of a HELLO, OPEN or ACCEPT.

    Raises:
        ProtocolError: an id came twice.
        FrameSizeError: a TLV runs over the frame's end.
    """
    tlvs: dict[int, bytes] = {}
    # Of bytes, and of nothing else, compiled code takes numbers and slices without calling the interpreter.
    data = bytes(raw)
    pos, end = 0, len(data)
    while pos < end:
        if end - pos < _TLV_HEADER:
            raise FrameSizeError("a TLV is cut off by the end of its frame")
        tlv_id = data[pos] << 8 | data[pos + 1]
        length = data[pos + 2] << 8 | data[pos + 3]
        pos += _TLV_HEADER
        if length > end - pos:
            raise FrameSizeError(f"TLV {tlv_id} runs over the end of its frame")
        if tlv_id in tlvs:
            raise ProtocolError(f"TLV {tlv_id} came twice")
        tlvs[tlv_id] = data[pos : pos + length]
        pos += length
    return tlvs


# Frames


def _frame(kind: int, stream: int, payload: bytes, flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, len(payload), stream) + payload


def encode_open(stream: int, priority: int, name: str, tlvs: Mapping[int, bytes]) -> bytes:
    """What ``Open`` encodes to, for whoever has no use for the frame itself.

    Raises:
        FrameSizeError: it is too much for one frame.
    """
    raw = name.encode()
    payload = bytes((priority, len(raw))) + raw + encode_tlvs(tlvs)
    if len(payload) > MAX_OPEN:
        raise FrameSizeError(f"OPEN of {len(payload)} bytes, more than {MAX_OPEN}")
    return _frame(_OPEN, stream, payload)


def encode_accept(stream: int, tlvs: Mapping[int, bytes]) -> bytes:
    """As ``encode_open``, of ``Accept``."""
    payload = encode_tlvs(tlvs) if tlvs else b""
    if len(payload) > MAX_OPEN:
        raise FrameSizeError(f"ACCEPT of {len(payload)} bytes, more than {MAX_OPEN}")
    return _frame(_ACCEPT, stream, payload)


class Data(NamedTuple):
    """Bytes of a stream. FIN ends the sender's half; BLOCKED says that more waits for credit."""

    stream: int
    payload: Buffer
    flags: int = 0

    def encode(self) -> bytes:
        return HEADER.pack(_DATA, self.flags, len(self.payload), self.stream) + self.payload


class Open(NamedTuple):
    """Asks the peer to open a stream of the type ``name``."""

    stream: int
    priority: int
    name: str
    tlvs: Mapping[int, bytes] = MappingProxyType({})

    def encode(self) -> bytes:
        return encode_open(self.stream, self.priority, self.name, self.tlvs)


class Accept(NamedTuple):
    """The target was reached; the stream is up both ways."""

    stream: int
    tlvs: Mapping[int, bytes] = MappingProxyType({})

    def encode(self) -> bytes:
        return encode_accept(self.stream, self.tlvs)


class Refuse(NamedTuple):
    """The stream was not processed; trying again makes sense after ``retry_ms``, if the code allows it."""

    stream: int
    code: int
    retry_ms: int = 0
    text: str = ""

    def encode(self) -> bytes:
        return _frame(_REFUSE, self.stream, _U32_U32.pack(self.code, self.retry_ms) + _encode_text(self.text))


class Reset(NamedTuple):
    """The sender's half ends abruptly after ``final_offset`` bytes of DATA."""

    stream: int
    code: int
    final_offset: int
    text: str = ""

    def encode(self) -> bytes:
        return _frame(_RESET, self.stream, _RESET_BODY.pack(self.code, self.final_offset) + _encode_text(self.text))


class Stop(NamedTuple):
    """Asks the peer to stop sending; it answers with RESET unless it had sent FIN."""

    stream: int
    code: int

    def encode(self) -> bytes:
        return _frame(_STOP, self.stream, _U32.pack(self.code))


class Credit(NamedTuple):
    """The receiver takes bytes of the stream up to the absolute ``max_offset``."""

    stream: int
    max_offset: int

    def encode(self) -> bytes:
        return _CREDIT_FRAME.pack(_CREDIT, 0, 8, self.stream, self.max_offset)


class Streams(NamedTuple):
    """The peer may send ``max_opens`` OPENs in the session's whole life."""

    max_opens: int

    def encode(self) -> bytes:
        return _CREDIT_FRAME.pack(_STREAMS, 0, 8, 0, self.max_opens)


class Goaway(NamedTuple):
    """No OPEN above ``last_id`` will be taken; the sender leaves within ``grace_ms``."""

    last_id: int
    code: int
    grace_ms: int
    text: str = ""

    def encode(self) -> bytes:
        return _frame(_GOAWAY, 0, _GOAWAY_BODY.pack(self.last_id, self.code, self.grace_ms) + _encode_text(self.text))


class Hello(NamedTuple):
    """The first frame each way."""

    vmin: int
    vmax: int
    nonce: bytes
    tlvs: Mapping[int, bytes] = MappingProxyType({})

    def encode(self) -> bytes:
        payload = _HELLO_BODY.pack(MAGIC, self.vmin, self.vmax, 0, self.nonce) + encode_tlvs(self.tlvs)
        if len(payload) > MAX_HELLO:
            raise FrameSizeError(f"HELLO of {len(payload)} bytes, more than {MAX_HELLO}")
        return _frame(_HELLO, 0, payload)


class Resume(NamedTuple):
    """The client asks to go on with a session whose connection broke."""

    session_id: bytes
    attempt: int
    rx_seq: int
    mac: bytes

    def encode(self) -> bytes:
        return _frame(_RESUME, 0, _RESUME_BODY.pack(self.session_id, self.attempt, self.rx_seq, self.mac))


class Resumed(NamedTuple):
    """The server goes on with the session."""

    rx_seq: int
    mac: bytes

    def encode(self) -> bytes:
        return _frame(_RESUMED, 0, _RESUMED_BODY.pack(self.rx_seq, self.mac))


class Ack(NamedTuple):
    """``seq`` sequenced frames were taken in so far."""

    seq: int

    def encode(self) -> bytes:
        return _CREDIT_FRAME.pack(_ACK, 0, 8, 0, self.seq)


class Ping(NamedTuple):
    """Answered by a PONG with the same ``opaque``."""

    opaque: int

    def encode(self) -> bytes:
        return _CREDIT_FRAME.pack(_PING, 0, 8, 0, self.opaque)


class Pong(NamedTuple):
    """``rx_bytes`` had been received on this connection when it was sent."""

    opaque: int
    rx_bytes: int

    def encode(self) -> bytes:
        return _frame(_PONG, 0, _U64_U64.pack(self.opaque, self.rx_bytes))


class Datagram(NamedTuple):
    """One unsequenced message of a stream whose type carries datagrams."""

    stream: int
    context: int
    payload: Buffer

    def encode(self) -> bytes:
        return _frame(_DATAGRAM, self.stream, bytes((self.context,)) + bytes(self.payload))


class Close(NamedTuple):
    """The session's last frame."""

    code: int
    text: str = ""

    def encode(self) -> bytes:
        return _frame(_CLOSE, 0, _U32.pack(self.code) + _encode_text(self.text))


class Priority(NamedTuple):
    """Asks the receiver to schedule its own sending on the stream so."""

    stream: int
    priority: int
    weight: int

    def encode(self) -> bytes:
        return _frame(_PRIORITY, self.stream, bytes((self.priority, self.weight)))


Frame: TypeAlias = (
    Data | Open | Accept | Refuse | Reset | Stop | Credit | Streams | Goaway | Hello | Resume | Resumed
    | Ack | Ping | Pong | Datagram | Close | Priority
)  # fmt: skip


# Decoding


def _data(flags: int, stream: int, raw: memoryview) -> Data:
    if flags == _FIN | _BLOCKED:
        raise ProtocolError("DATA with FIN and BLOCKED together")
    if not raw and not flags:
        raise ProtocolError("empty DATA with neither FIN nor BLOCKED")
    return Data(stream, raw, flags)


def _open(_flags: int, stream: int, raw: memoryview) -> Open:
    data = bytes(raw)
    end = 2 + data[1]
    if end > len(data):
        raise FrameSizeError("OPEN is cut off in its type name")
    name = data[2:end].decode("latin-1")
    if not is_type_name(name):
        raise ProtocolError("OPEN with a type name that is not printable ASCII")
    return Open(stream, _priority_class(data[0]), name, decode_tlvs(data[end:]))


def _refuse(_flags: int, stream: int, raw: memoryview) -> Refuse:
    code, retry_ms = _U32_U32.unpack_from(raw)
    return Refuse(stream, code, retry_ms, clean_text(raw[_U32_U32.size :]))


def _reset(_flags: int, stream: int, raw: memoryview) -> Reset:
    code, final_offset = _RESET_BODY.unpack_from(raw)
    return Reset(stream, code, final_offset, clean_text(raw[_RESET_BODY.size :]))


def _goaway(_flags: int, _stream: int, raw: memoryview) -> Goaway:
    last_id, code, grace_ms = _GOAWAY_BODY.unpack_from(raw)
    return Goaway(last_id, code, grace_ms, clean_text(raw[_GOAWAY_BODY.size :]))


def _hello(_flags: int, _stream: int, raw: memoryview) -> Hello:
    magic, vmin, vmax, _reserved, nonce = _HELLO_BODY.unpack_from(raw)
    if magic != MAGIC:
        raise ProtocolError("HELLO without the magic KNK1")
    if vmin > vmax:
        raise ProtocolError(f"HELLO with versions from {vmin} down to {vmax}")
    return Hello(vmin, vmax, nonce, decode_tlvs(raw[_HELLO_BODY.size :]))


def _close(_flags: int, _stream: int, raw: memoryview) -> Close:
    (code,) = _U32.unpack_from(raw)
    return Close(code, clean_text(raw[_U32.size :]))


def _priority_class(value: int) -> int:
    if value > 2:
        raise ProtocolError(f"priority class {value}; there are 0, 1 and 2")
    return value


class _Rule(NamedTuple):
    """What a type's header must look like, and how its payload is read."""

    name: str
    least: int
    most: int
    of_stream: bool
    flags: int
    read: Callable[[int, int, memoryview], Frame]


_RULES: Final[dict[int, _Rule]] = {
    _DATA: _Rule("DATA", 0, MAX_PAYLOAD, True, _FIN | _BLOCKED, _data),
    _OPEN: _Rule("OPEN", 3, MAX_OPEN, True, 0, _open),
    _ACCEPT: _Rule("ACCEPT", 0, MAX_OPEN, True, 0, lambda _, stream, raw: Accept(stream, decode_tlvs(raw))),
    _REFUSE: _Rule("REFUSE", 8, 8 + MAX_TEXT, True, 0, _refuse),
    _RESET: _Rule("RESET", 12, 12 + MAX_TEXT, True, 0, _reset),
    _STOP: _Rule("STOP", 4, 4, True, 0, lambda _, stream, raw: Stop(stream, *_U32.unpack(raw))),
    _CREDIT: _Rule("CREDIT", 8, 8, True, 0, lambda _, stream, raw: Credit(stream, *_U64.unpack(raw))),
    _STREAMS: _Rule("STREAMS", 8, 8, False, 0, lambda _, __, raw: Streams(*_U64.unpack(raw))),
    _GOAWAY: _Rule("GOAWAY", 12, 12 + MAX_TEXT, False, 0, _goaway),
    _HELLO: _Rule("HELLO", _HELLO_BODY.size, MAX_HELLO, False, 0, _hello),
    _RESUME: _Rule("RESUME", 60, 60, False, 0, lambda _, __, raw: Resume(*_RESUME_BODY.unpack(raw))),
    _RESUMED: _Rule("RESUMED", 40, 40, False, 0, lambda _, __, raw: Resumed(*_RESUMED_BODY.unpack(raw))),
    _ACK: _Rule("ACK", 8, 8, False, 0, lambda _, __, raw: Ack(*_U64.unpack(raw))),
    _PING: _Rule("PING", 8, 8, False, 0, lambda _, __, raw: Ping(*_U64.unpack(raw))),
    _PONG: _Rule("PONG", 16, 16, False, 0, lambda _, __, raw: Pong(*_U64_U64.unpack(raw))),
    _DATAGRAM: _Rule("DATAGRAM", 1, MAX_PAYLOAD, True, 0, lambda _, stream, raw: Datagram(stream, raw[0], raw[1:])),
    _CLOSE: _Rule("CLOSE", 4, 4 + MAX_TEXT, False, 0, _close),
    _PRIORITY: _Rule(
        "PRIORITY", 2, 2, True, 0, lambda _, stream, raw: Priority(stream, _priority_class(raw[0]), raw[1] or 1)
    ),
}


def check_header(kind: int, flags: int, length: int, stream: int, max_frame: int = MAX_PAYLOAD) -> None:
    """Judges a header before its payload has arrived, so that a lie costs no memory and no wait.

    Raises:
        ProtocolError: unknown type without the ignorable bit, undefined flag, or wrong kind of stream.
        FrameSizeError: the length does not fit the type, or exceeds ``max_frame``.
    """
    if length > max_frame:
        raise FrameSizeError(f"a frame of {length} bytes, more than the agreed {max_frame}")
    rule = _RULES.get(kind)
    if rule is None:
        if not kind & IGNORABLE:
            raise ProtocolError(f"unknown frame type 0x{kind:02x}")
        return
    if flags & ~rule.flags:
        raise ProtocolError(f"{rule.name} with undefined flags 0x{flags & ~rule.flags:02x}")
    if (stream != 0) is not rule.of_stream:
        raise ProtocolError(f"{rule.name} on stream {stream}" if stream else f"{rule.name} on the session")
    if not rule.least <= length <= rule.most:
        raise FrameSizeError(f"{rule.name} of {length} bytes; it has {rule.least} to {rule.most}")


def decode(kind: int, flags: int, stream: int, payload: memoryview, max_frame: int = MAX_PAYLOAD) -> Frame | None:
    """One whole frame from its header's fields and its payload, in place.

    Returns:
        The frame, or None for an unknown type that may be ignored. ``Data.payload`` and
        ``Datagram.payload`` are slices of ``payload``: valid as long as its buffer is.

    Raises:
        ProtocolError, FrameSizeError: as ``check_header``, or the payload is malformed.
    """
    check_header(kind, flags, len(payload), stream, max_frame)
    return read(kind, flags, stream, payload)


def read(kind: int, flags: int, stream: int, payload: memoryview) -> Frame | None:
    """``decode`` for a header that ``check_header`` has passed."""
    rule = _RULES.get(kind)
    return None if rule is None else rule.read(flags, stream, payload)


def scan(buffer: Buffer, max_frame: int = MAX_PAYLOAD) -> Iterator[tuple[Frame | None, int]]:
    """Every whole frame of a buffer, with the offset just past it; stops before one that is not all there.

    For tools and tests; the multiplexer runs the same loop with its own short way for DATA.
    """
    view = memoryview(buffer)
    pos, end = 0, len(view)
    while end - pos >= HEADER_SIZE:
        kind, flags, length, stream = HEADER.unpack_from(view, pos)
        check_header(kind, flags, length, stream, max_frame)
        stop = pos + HEADER_SIZE + length
        if stop > end:
            return
        yield decode(kind, flags, stream, view[pos + HEADER_SIZE : stop], max_frame), stop
        pos = stop
