"""What a process that runs an endpoint needs around it: descriptors, allocator, collector, loop, signals, logs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import resource
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any, Final, Protocol, TypeVar

__all__ = ["run", "serve", "set_up_logging"]

T = TypeVar("T")

EXIT_ABORTED: Final = 130
FIELDS: Final = ("session", "peer", "worker")
"""Of a record, where it has them: which session of this process it is about, with whom, and which worker."""

logger: Final = logging.getLogger("konnektor.runtime")

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in a process tuned for an endpoint, on uvloop where there is one."""
    raise_descriptor_limit()
    keep_freed_memory()
    gc.collect()
    # What was imported lives until the end: no collection need look at it again.
    gc.freeze()
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def raise_descriptor_limit() -> None:
    """Soft limit of open files to the hard one: each stream takes a descriptor."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory() -> None:
    """Stops glibc from giving each freed buffer back to the kernel and asking for it again a moment later.

    Bulk transfer allocates and frees blocks of 64 to 256 KiB all the time; with the default thresholds
    that doubled the system time of a sender.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * 1024 * 1024)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * 1024 * 1024)


class Served(Protocol):
    """What ``serve`` needs of an endpoint."""

    async def drain(self, grace: float) -> None: ...
    async def aclose(self) -> None: ...


async def serve(endpoint: Served, life: Coroutine[Any, Any, None], grace: float) -> int:
    """Runs ``life`` until SIGTERM or SIGINT, then drains within ``grace`` seconds; a second signal aborts.

    SIGHUP, which makes other servers read their files again, is only answered in the log: here it takes no signal.

    Args:
        endpoint: closed at the end, whatever happens.
        life: starts the endpoint and goes on for as long as it serves.
        grace: seconds.

    Returns:
        The exit status: 0, or 130 when aborted.

    Raises:
        Whatever ``life`` raises, if it ends first.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    loop.add_signal_handler(signal.SIGHUP, _hung_up)
    serving = loop.create_task(life)
    first = loop.create_task(signals.get())
    tasks: list[asyncio.Task[Any]] = [serving, first]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
            return 0
        logger.info("%s: draining for up to %g s; once more aborts", first.result().name, grace)
        draining = loop.create_task(endpoint.drain(grace))
        second = loop.create_task(signals.get())
        tasks += [draining, second]
        await asyncio.wait({draining, second}, return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            await draining
            return 0
        logger.info("%s: aborting", second.result().name)
        return EXIT_ABORTED
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await endpoint.aclose()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def _hung_up() -> None:
    logger.info("SIGHUP: going on; certificate files that change are read again by themselves")


class _Text(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        # One line an event, tracebacks included: log collectors count lines.
        return super().format(record).replace("\n", " | ")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for field in FIELDS:
            if value := getattr(record, field, None):
                line[field] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(format_: str, verbosity: int) -> None:
    """Logs to standard error, one line an event.

    Args:
        format_: ``text`` or ``json``.
        verbosity: 0 who connects, disconnects and is refused; 1 every tunnel, too; 2 the event loop's own as well.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format_ == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if verbosity == 0 else logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.WARNING if verbosity < 2 else logging.DEBUG)
