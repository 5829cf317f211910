"""Options that both endpoints take, what they amount to, and the conversion of values."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from konnektor.addresses import quote
from konnektor.errors import ConfigurationError
from konnektor.limits import Limits, bounds, format_size, parse_size
from konnektor.priorities import PriorityRule, parse_priority
from konnektor.runtime import set_up_logging
from konnektor.tls import TLSFiles

__all__ = ["Common", "Parsed", "endpoint_options", "forget_output", "say_ready"]

logger: Final = logging.getLogger("konnektor.cli")

_DEFAULT: Final = Limits()
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|)")
_SECONDS: Final = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Seconds from ``25s``, ``500ms``, ``2m`` or ``25``."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"{text!r} is not a duration: write for example 25s, 500ms or 2m")
    return float(match[1]) * _SECONDS[match[2]]


# What becomes a field of Limits by itself is checked here, too: Limits does not know the flag, nor how sizes are written.


def _parse_streams(text: str) -> int:
    low, high = map(int, bounds("initial_streams"))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(high)) and low <= int(text) <= high):
        raise ConfigurationError(f"{quote(text)} is not a number of streams: write one from {low} to {high}")
    return int(text)


def _parse_replay_buffer(text: str) -> int:
    size, (least, _) = parse_size(text), bounds("replay_buffer")
    if size < least:
        raise ConfigurationError(f"{text} is too small: write {format_size(int(least))} or more")
    return size


def _parse_resume_grace(text: str) -> float:
    seconds, (_, longest) = parse_duration(text), bounds("resume_grace")
    if seconds > longest:
        raise ConfigurationError(f"{text} is too long: write {longest / _SECONDS['h']:g}h or less")
    return seconds


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # generic in newer clicks only
    _ParamType = click.ParamType


class Parsed(_ParamType):
    """A click type from a parser that raises ConfigurationError; the text is kept out of tracebacks."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)


_UNSERVED: Final = 64
"""Streams that a peer may open in vain: each has its part of the receive pool set aside, which others can use."""

_OPTIONS: Final = (
    click.option("--ca", required=True, metavar="FILE", help="CA that issued both ends. Example: --ca pki/ca.pem"),
    click.option("--cert", required=True, metavar="FILE", help="Certificate of this end. Example: --cert pki/cp.pem"),
    click.option("--key", required=True, metavar="FILE", help="Its key. Example: --key pki/cp.key"),
    click.option(
        "--max-streams",
        type=Parsed("number", _parse_streams),
        metavar="N",
        help=f"Streams the peer may have open at once. Default: {_DEFAULT.initial_streams}, or {_UNSERVED} at a control "
        "plane without --allow-from, which serves none. Example: --max-streams 10000",
    ),
    click.option(
        "--receive-pool",
        type=Parsed("size", parse_size),
        metavar="SIZE",
        help="Bound on bytes granted to a peer and not consumed. Default: 64MiB, or what --max-streams needs. "
        "Example: --receive-pool 256MiB",
    ),
    click.option(
        "--grace",
        type=Parsed("duration", parse_duration),
        default="25s",
        show_default=True,
        metavar="TIME",
        help="How long open streams may go on after SIGTERM. Example: --grace 2m",
    ),
    click.option(
        "--resume-grace",
        type=Parsed("duration", _parse_resume_grace),
        default=f"{_DEFAULT.resume_grace:g}s",
        show_default=True,
        metavar="TIME",
        help="How long streams wait for a broken connection to come back; 0 for not at all. Example: --resume-grace 5m",
    ),
    click.option(
        "--replay-buffer",
        type=Parsed("size", _parse_replay_buffer),
        default=format_size(_DEFAULT.replay_buffer),
        show_default=True,
        metavar="SIZE",
        help="Bytes kept, of each session, to be sent again after that. Example: --replay-buffer 64MiB",
    ),
    click.option(
        "--priority",
        "priorities",
        multiple=True,
        type=Parsed("priority", parse_priority),
        metavar="[udp:]HOST-OR-CIDR:PORTS=CLASS[:WEIGHT]",
        help="What streams to a destination are served as, in both directions: interactive, default or bulk, whose "
        "shares are 8, 4 and 1, times a weight of 1 to 255; * is any host; the first that fits. "
        "Example: --priority '*:22,10250=interactive' --priority 10.0.0.0/8:873=bulk --priority db.example:5432=default:4",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Lines on standard error. Example: --log-format json",
    ),
    click.option("-v", "--verbose", count=True, help="More lines; twice for all. Example: -vv"),
)


@dataclass(frozen=True, slots=True)
class Common:
    """What the options of both endpoints amount to; ``grace`` is in seconds."""

    tls: TLSFiles
    limits: Limits
    grace: float
    priorities: tuple[PriorityRule, ...]


def endpoint_options(
    serves: Callable[[Mapping[str, Any]], object] = lambda _own: True,
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Adds the options of both endpoints to a command, which gets them as one ``Common``, first; logging is set up.

    Args:
        serves: whether the command, with these options of its own, serves any streams of its peers'.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        return _with_options(command, serves)

    return decorate


def _with_options(command: Callable[..., int], serves: Callable[[Mapping[str, Any]], object]) -> Callable[..., int]:
    @functools.wraps(command)
    def with_common(
        *,
        ca: str,
        cert: str,
        key: str,
        max_streams: int | None,
        receive_pool: int | None,
        grace: float,
        resume_grace: float,
        replay_buffer: int,
        priorities: tuple[PriorityRule, ...],
        log_format: str,
        verbose: int,
        **own: Any,
    ) -> int:
        set_up_logging(log_format, verbose)
        if max_streams is None:
            max_streams = _DEFAULT.initial_streams if serves(own) else _UNSERVED
        limits = _limits(max_streams, receive_pool, resume_grace=resume_grace, replay_buffer=replay_buffer)
        return command(Common(TLSFiles(ca, cert, key), limits, grace, priorities), **own)

    return functools.reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), with_common)


def _limits(max_streams: int, receive_pool: int | None, **others: Any) -> Limits:
    """The limits that the options describe.

    Raises:
        ConfigurationError: the pool is too small for the streams.
    """
    need = 2 * max_streams * _DEFAULT.initial_window
    pool = max(_DEFAULT.receive_pool, need) if receive_pool is None else receive_pool
    if pool < need:
        raise ConfigurationError(
            f"--receive-pool {format_size(pool)} is too small for --max-streams {max_streams}: "
            f"give it {format_size(need)} or more, or lower --max-streams"
        )
    return Limits(initial_streams=max_streams, receive_pool=pool, **others)


def say_ready(what: str) -> None:
    """The one line on standard output, at once even into a pipe; nobody has to read it, but who waits for it may be told."""
    try:
        click.echo(f"ready {what}")
    except OSError as error:
        logger.error(  # noqa: TRY400 - an event, not a defect
            "cannot write the ready line to standard output: %s; going on without it", error.strerror
        )
        forget_output()


def forget_output() -> None:
    """What could not be written to standard output gets no other try when Python exits."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
