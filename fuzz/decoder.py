"""The frame decoder, and what reads inside frames: any bytes, in any pieces.

An input is one byte that chooses the receiver's ``max_frame``, one that chooses the pieces, and the bytes of a connection.
"""

import contextlib
from collections.abc import Iterator

from fuzz import vectors
from konnektor.addresses import parse_host
from konnektor.errors import ConfigurationError, ProtocolError
from konnektor.frames import HEADER_SIZE, Frame, Hello, Open, OpenTLV, Priority, clean_text, scan
from konnektor.replay import Ticket
from konnektor.router import parse_route
from konnektor.settings import FLOORS, Settings
from konnektor.stream_types import Tcp, Udp

MAX_INPUT = 4096
MAX_FRAMES = (65_535, 16_376, 4096, 64, 8)
Seen = tuple[list[Frame | None], str]


def one(data: bytes) -> None:
    """Judges one input.

    Raises:
        Exception: anything but what the decoder's documentation names.
    """
    if len(data) < 2:
        return
    max_frame = MAX_FRAMES[data[0] % len(MAX_FRAMES)]
    wire = data[2:]
    whole = _seen([wire], max_frame)
    assert _seen(_pieces(wire, data[1]), max_frame) == whole, "another meaning in other pieces"
    for frame in whole[0]:
        if frame is not None:
            _encode_again(frame)
            _read_inside(frame)


def seeds() -> Iterator[bytes]:
    """The vectors, whole and in pieces."""
    for name in ("frames", "errors", "sessions"):
        for data in vectors.load(name):
            yield b"\0\0" + data
            yield b"\3\2" + data


def _pieces(wire: bytes, choice: int) -> list[bytes]:
    size = choice + 1 if len(wire) < 600 else choice + 16
    first = choice % 7
    return [wire[:first], *(wire[pos : pos + size] for pos in range(first, len(wire), size))]


def _seen(pieces: list[bytes], max_frame: int) -> Seen:
    """What a receiver makes of the pieces: the frames, and the error that ended it."""
    frames: list[Frame | None] = []
    rest = b""
    for piece in pieces:
        rest += piece
        used = 0
        try:
            for frame, end in scan(rest, max_frame):
                frames.append(_kept(frame))
                used = end
        except ProtocolError as error:
            return frames, f"{type(error).__name__}: {error}"
        rest = rest[used:]
        assert len(rest) < HEADER_SIZE + max_frame, "more is kept than a frame"
    return frames, ""


def _kept(frame: Frame | None) -> Frame | None:
    """The frame without the buffer that it was read from."""
    payload = getattr(frame, "payload", None)
    return frame._replace(payload=bytes(payload)) if payload is not None else frame  # type: ignore[union-attr,call-arg]


def _encode_again(frame: Frame) -> None:
    """What an encoder makes of it is the same frame; of a text, at least as much as a frame carries."""
    encoded = frame.encode()
    [(again, end)] = scan(encoded)
    assert end == len(encoded)
    again = _kept(again)
    assert again is not None
    text = getattr(frame, "text", None)
    if text is not None:
        assert text == clean_text(text.encode())
        assert text.startswith(again.text)  # type: ignore[union-attr]
        frame = frame._replace(text=again.text)  # type: ignore[union-attr,call-arg]
    assert again == frame
    assert again.encode() == encoded


def _read_inside(frame: Frame) -> None:
    """What the session reads out of a frame's fields, which are the peer's word."""
    match frame:
        case Hello(tlvs=tlvs):
            with contextlib.suppress(ProtocolError):
                settings = Settings.from_tlvs(tlvs)
                for name in ("max_frame", "initial_window", "initial_streams", "idle_timeout"):
                    assert getattr(settings, name) >= getattr(FLOORS, name)
                for route in settings.routes:
                    with contextlib.suppress(ConfigurationError):
                        parse_route(route)
            with contextlib.suppress(ProtocolError):
                Ticket.from_tlvs(tlvs)
        case Open(tlvs=tlvs):
            for kind in (Tcp, Udp):
                with contextlib.suppress(ValueError):
                    request = kind.decode(tlvs.get(OpenTLV.HEADER, b""))
                    assert kind.decode(request.encode()) == request
                    parse_host(request.host)  # raises a ConfigurationError, which is a ValueError
        case Priority(priority=priority, weight=weight):
            assert priority < 3
            assert weight
