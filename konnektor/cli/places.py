"""Where one command listens, by its flags: no two of them may want the same address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from itertools import combinations
from typing import Final, NamedTuple

from konnektor.addresses import Forward, format_hostport, format_protocol, parse_hostport
from konnektor.errors import ConfigurationError
from konnektor.frontends.urls import Frontend, UnixFrontend

__all__ = ["check_places", "forward_flag"]

_LOCALHOST: Final = ("127.0.0.1", "::1")


class _Place(NamedTuple):
    """Where one flag listens; a Unix socket's ``host`` is its path."""

    flag: str
    kind: str
    host: str
    port: int


def check_places(listen: str, frontends: Iterable[Frontend], forwards: Iterable[Forward]) -> None:
    """Refuses flags that want the same address, of which the kernel would say no more than that it is in use.

    Raises:
        ConfigurationError: which two they are.
    """
    for first, second in combinations(_places(listen, frontends, forwards), 2):
        if first.kind == second.kind and first.port == second.port != 0 and _meet(first.host, second.host):
            if first.flag == second.flag:
                raise ConfigurationError(f"{first.flag} is given twice: give one of them another address")
            raise ConfigurationError(
                f"{second.flag} is where {first.flag} listens already: give one of them another address"
            )


def forward_flag(forward: Forward) -> str:
    """``--forward`` and where it listens, for messages."""
    return f"--forward {format_protocol(forward.protocol)}{format_hostport(forward.listen_host, forward.listen_port)}"


def _places(listen: str, frontends: Iterable[Frontend], forwards: Iterable[Forward]) -> Iterator[_Place]:
    host, port = parse_hostport(listen, zero=True)
    yield _Place(f"--listen {format_hostport(host, port)}", "tcp", host, port)
    for frontend in frontends:
        if isinstance(frontend, UnixFrontend):
            yield _Place(f"--frontend {frontend}", "unix", frontend.path, -1)
        else:
            yield _Place(f"--frontend {frontend}", "tcp", frontend.host, frontend.port)
    for forward in forwards:
        yield _Place(forward_flag(forward), forward.protocol, forward.listen_host, forward.listen_port)


def _meet(one: str, other: str) -> bool:
    """Whether two hosts to listen on have an address in common, as far as their text tells."""
    if one == other:
        return True
    try:
        pairs = [(ip_address(a), ip_address(b)) for a in _addresses(one) for b in _addresses(other)]
    except ValueError:  # a name
        return False
    return any(a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified) for a, b in pairs)


def _addresses(host: str) -> tuple[str, ...]:
    return _LOCALHOST if host == "localhost" else (host,)
