"""The settings of a session: windows, budgets and timeouts, frozen and validated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Final

from konnektor.errors import ConfigurationError

__all__ = ["FULL_FRAME", "KIB", "MAX_DEADLINE", "MIB", "Limits", "bounds", "format_size", "parse_size"]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

FULL_FRAME: Final = 61 * KIB
"""Bytes of the longest frame that is sent, header included. With what TLS adds it is one segment of TCP, as Linux hands them down
before they are cut to packets: 62,636 bytes where those are of 9,000, 65,160 where they are of 1,500, 65,483 on loopback. A write
that is a little longer ends in another one, of next to nothing."""

MAX_DEADLINE: Final = 300.0
"""Seconds that an OPEN may wait for its answer, at most."""

_FLOORS: Final[dict[str, float]] = {
    # Peers may rely on the first four of these before they have read our HELLO (docs/protocol.md, "Settings").
    "max_frame": 16_376,
    "initial_window": 16 * KIB,
    "initial_streams": 8,
    "idle_timeout": 30,
    "receive_pool": 256 * KIB,
    "max_window": 16 * KIB,
    "send_queue": 1 * KIB,
    "ack_bytes": 1,
    "ack_delay": 0.001,
    "hello_timeout": 0.1,
    "open_deadline": 0.001,
    "flight_floor": 64 * KIB,
    "resume_grace": 0,
    "replay_buffer": 256 * KIB,
}
_CEILINGS: Final[dict[str, float]] = {
    "max_frame": 65_535,
    "initial_window": 16 * MIB,
    "initial_streams": 1_000_000,
    "open_deadline": MAX_DEADLINE,
    "idle_timeout": 86_400,
    "resume_grace": 86_400,
}


def bounds(name: str) -> tuple[float, float]:
    """The least and the greatest value that a field of ``Limits`` may have by itself; infinity where there is none."""
    return _FLOORS[name], _CEILINGS.get(name, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one session may use. Sizes are bytes, times seconds.

    The first four are declared to the peer in HELLO and hold for the life of the session.

    Attributes:
        max_frame: largest payload we take in one frame.
        initial_window: bytes of each stream we take before granting more (W0).
        initial_streams: streams the peer may have open at once.
        idle_timeout: silence after which the peer may give the connection up.
        receive_pool: bound on all bytes granted and not yet consumed (B); half of it is
            reserved for ``initial_window * initial_streams``. What is left is lent to the replay buffer, too.
        max_window: largest window one stream can grow to.
        send_queue: bytes a stream holds for sending before ``send()`` waits.
        ack_bytes: taken in before an ACK is due at once.
        ack_delay: longest wait for an ACK.
        hello_timeout: longest wait for the peer's HELLO.
        open_deadline: how long an OPEN waits for its answer unless it says otherwise.
        flight_floor: bytes that may always be unacknowledged, whatever the estimates say.
        resume_grace: how long a session whose connection broke waits for another; 0: not at all.
        replay_buffer: bytes that may be unacknowledged, beside what the pool can spare; they are kept to be sent again.

    Raises:
        ConfigurationError: a value is out of range, or the values do not fit together.
    """

    max_frame: int = 65_535
    initial_window: int = 32 * KIB
    initial_streams: int = 1024
    idle_timeout: float = 60.0
    receive_pool: int = 64 * MIB
    max_window: int = 64 * MIB
    send_queue: int = 64 * KIB
    ack_bytes: int = FULL_FRAME
    ack_delay: float = 0.025
    hello_timeout: float = 10.0
    open_deadline: float = 30.0
    flight_floor: int = 4 * FULL_FRAME
    resume_grace: float = 60.0
    replay_buffer: int = 16 * MIB

    @property
    def session_memory(self) -> int:
        """Bytes that the peer of one session can make this side hold: what it may send, and what it need not acknowledge."""
        return self.receive_pool + (self.replay_buffer if self.resume_grace else 0)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int if field.type == "int" else (int, float)):
                raise ConfigurationError(f"{field.name} must be a number ({field.type}), not {value!r}")
            low, high = bounds(field.name)
            if not low <= value <= high:
                bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise ConfigurationError(f"{field.name} must be {bound}, not {value!r}")
        reserve = self.initial_window * self.initial_streams
        if reserve > self.receive_pool // 2:
            raise ConfigurationError(
                f"{self.initial_streams} streams of {format_size(self.initial_window)} need a receive pool of at "
                f"least {format_size(2 * reserve)}, not {format_size(self.receive_pool)}: raise the pool or lower "
                "the number of streams"
            )


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?(k|m|g|)(?:i?b)?", re.IGNORECASE | re.ASCII)
_UNITS: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB}


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``64k``, ``64KiB``, ``1.5GiB``; units are powers of 1024.

    Raises:
        ConfigurationError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigurationError(f"{text!r} is not a size; write for example 512KiB, 64MiB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(size: int) -> str:
    """The shortest exact form that ``parse_size`` reads back."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
