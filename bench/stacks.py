"""Stacks that py-spy has counted: read from its raw format, and put into groups by where their time went."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

__all__ = ["Frame", "Group", "Stacks", "group_of", "grouped", "lineage", "parse", "tidy", "weighed"]


class Group(StrEnum):
    """Where time goes, in the order of the tables."""

    RECEIVING = "system calls: receiving"
    SENDING = "system calls: sending"
    POLLING = "system calls: waiting for events"
    SYSTEM = "system calls: others"
    READING = "TLS: reading"
    WRITING = "TLS: writing"
    TLS = "TLS: handshakes and others"
    LOOP = "the event loop"
    MULTIPLEXER = "the multiplexer"
    SPLICE = "splices"
    KONNEKTOR = "the rest of konnektor"
    OTHER = "other"


class Frame(NamedTuple):
    """A function, of Python or native, and its file as py-spy shortens it."""

    name: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file})" if self.name != self.file else self.file


Stacks = Mapping[tuple[Frame, ...], float]
"""Samples, or their weight, by stack; each from the outermost frame to the innermost."""

_LINE: Final = re.compile(r"(?P<stack>.+) (?P<count>\d+)")
_FRAME: Final = re.compile(r"(?P<name>.+) \((?P<file>[^()]+?)(?::\d+)?\)")
_ADDRESS: Final = re.compile(r"0x[0-9a-f]+")

_CALLS: Final = {
    **dict.fromkeys(("read", "readv", "recv", "recvfrom", "recvmsg"), Group.RECEIVING),
    **dict.fromkeys(("send", "sendmsg", "sendto", "write", "writev"), Group.SENDING),
    **dict.fromkeys(("epoll_pwait", "epoll_wait", "poll", "select"), Group.POLLING),
    **dict.fromkeys(
        ("accept", "accept4", "bind", "close", "connect", "epoll_ctl", "fcntl", "fcntl64", "fstat", "fstat64", "getpeername",
         "getsockname", "getsockopt", "ioctl", "listen", "madvise", "mmap", "munmap", "open", "open64", "setsockopt", "shutdown",
         "socket", "stat", "stat64"),
        Group.SYSTEM,
    ),
}  # fmt: skip
"""By the function of the C library; most of that time is the kernel's."""
_SYSTEM: Final = frozenset({Group.RECEIVING, Group.SENDING, Group.POLLING, Group.SYSTEM})
_TLS: Final = ("ssl.py", "_ssl.c", "_ssl.c.h", "libssl", "libcrypto", "konnektor/handshake.py")
_TLS_CALLS: Final = {
    "SSLObject.read": Group.READING,
    "_ssl__SSLSocket_read": Group.READING,
    "SSLObject.write": Group.WRITING,
    "_ssl__SSLSocket_write": Group.WRITING,
}
_LOOP: Final = frozenset(
    {"async.c", "core.c", "epoll.c", "linux.c", "linux-core.c", "loop.c", "loop-watcher.c", "stream.c", "tcp.c", "timer.c",
     "uv-common.c"}
)  # fmt: skip
"""uvloop's one file, as Cython made it, and libuv's."""
_SPLICE: Final = frozenset({"forward", "relay", "socket_transport", "splice"})
_MULTIPLEXER: Final = frozenset(
    {"abuse", "acks", "admission", "credit", "datagrams", "deadlines", "drain", "driver", "flight", "frames", "inbound", "liveness",
     "mux", "mux_stream", "outbound", "replay", "resumption", "scheduler", "scratch", "states"}
)  # fmt: skip
"""What runs for every frame, the driver included."""


def parse(text: str) -> Counter[tuple[Frame, ...]]:
    """Of py-spy's raw format: a line for each stack, its frames with semicolons between, then how often it was seen.

    Raises:
        ValueError: a line is something else.
    """
    stacks: Counter[tuple[Frame, ...]] = Counter()
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"not a line of py-spy's raw format: {line[:80]!r}")
        stacks[tuple(map(_frame, found["stack"].split(";")))] += int(found["count"])
    return stacks


def _frame(text: str) -> Frame:
    found = _FRAME.fullmatch(text)
    if found is None:
        return Frame(text, "")
    name, file = found["name"], found["file"]
    # Without symbols an address says no more than its library does.
    return Frame(file if _ADDRESS.fullmatch(name) else name, file)


def group_of(frame: Frame, *, innermost: bool = False) -> Group | None:
    """Where the time of a function goes; None if that is for its caller to say, as with memcpy or a set's lookup."""
    name, file = frame
    if file.startswith(("libc.", "libc-", "libpthread")):
        return _CALLS.get(name.lstrip("_").removeprefix("libc_")) if innermost else None
    if file.startswith(_TLS):
        return _TLS_CALLS.get(name.removesuffix("_impl"), Group.TLS)
    if file in _LOOP or file.startswith("asyncio/"):
        return Group.LOOP
    if file.startswith("konnektor/"):
        module = file.rpartition("/")[2].removesuffix(".py")
        return Group.MULTIPLEXER if module in _MULTIPLEXER else Group.SPLICE if module in _SPLICE else Group.KONNEKTOR
    return None


def lineage(stack: Iterable[Frame]) -> Iterator[Group]:
    """The group of each frame, from the outermost to the innermost: its own, or its caller's.

    What OpenSSL does for SSLObject.read is reading.
    """
    frames = list(stack)
    group = Group.OTHER
    for frame in frames:
        own = group_of(frame, innermost=frame is frames[-1])
        if own is not None and not (own is Group.TLS and group in {Group.READING, Group.WRITING}):
            group = own
        yield group


def _group(stack: Iterable[Frame]) -> Group:
    *_, innermost = lineage(stack)
    return innermost


def grouped(stacks: Stacks) -> dict[Group, float]:
    """Shares of the time by group, all of them in order; together they are 1, unless there are no samples."""
    weights = dict.fromkeys(Group, 0.0)
    for stack, weight in stacks.items():
        weights[_group(stack)] += weight
    total = sum(weights.values()) or 1.0
    return {group: weight / total for group, weight in weights.items()}


def weighed(stacks: Stacks, kernel: float) -> Stacks:
    """The same stacks, weighed so that system calls have the share of the time that the kernel says it took itself.

    py-spy cannot tell a thread that runs from one that waits for a core. Nearly all such waiting is in system calls: one
    that waited for events was woken, one that sent something woke another, which took its core. With more processes at work
    than cores they would look twice as dear as they are. What Python and libraries do among themselves is seen as it is.

    Args:
        kernel: system time by user and system time together; not a number if there was none.
    """
    seen = sum(share for group, share in grouped(stacks).items() if group in _SYSTEM)
    if not 0 < seen < 1 or not 0 <= kernel <= 1:
        return stacks
    factors = {True: kernel / seen, False: (1 - kernel) / (1 - seen)}
    return {stack: weight * factors[_group(stack) in _SYSTEM] for stack, weight in stacks.items()}


def tidy(stack: Iterable[Frame]) -> tuple[Frame, ...]:
    """What is worth a picture of a stack: from the loop's start on, each function once, and no inlined trifles."""
    frames: list[Frame] = []
    for frame in stack:
        if frame.file.endswith(".h") and not frame.file.startswith(_TLS):
            continue
        if not frames or frames[-1] != frame:
            frames.append(frame)
        if frame.name == "Runner.run":
            frames.clear()
    return tuple(frames)
