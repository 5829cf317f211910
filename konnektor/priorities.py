"""Class and weight of streams by rule: which destinations go ahead of which.

Either end may have rules. The opener's go with its OPEN, and with a PRIORITY for the weight; the accepting end's with a
PRIORITY. A rule holds for what this end sends whatever the peer asks for, so with rules at both ends each
decides about its own direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from konnektor.addresses import (
    IPAddress,
    IPNetwork,
    Protocol,
    format_hosts,
    format_ports,
    format_protocol,
    parse_host,
    quote,
    unwrap,
)
from konnektor.arguments import listed, object_or_text
from konnektor.errors import ConfigurationError
from konnektor.policy import parse_rule
from konnektor.stream_types import StreamType, Tcp, Udp

__all__ = ["CLASSES", "Priorities", "PriorityRule", "parse_priority"]

CLASSES: Final = ("interactive", "default", "bulk")
"""The classes by their numbers on the wire."""


@dataclass(frozen=True, slots=True)
class PriorityRule:
    """What streams to some destinations get. ``parse_priority`` makes it.

    Attributes:
        host: a network, a DNS name in lower case, a name that starts with ``*.``, or ``*`` for any host.
        ports: the ports, as ranges.
        protocol: ``tcp`` or ``udp``.
        priority: class, index into CLASSES.
        weight: among the streams of its class, 1 to 255.
    """

    host: IPNetwork | str
    ports: tuple[range, ...]
    protocol: Protocol
    priority: int
    weight: int = 1

    def __str__(self) -> str:
        where = f"{format_protocol(self.protocol)}{format_hosts(self.host)}:{format_ports(self.ports)}"
        return f"{where}={CLASSES[self.priority]}" + (f":{self.weight}" if self.weight != 1 else "")

    def fits(self, host: IPAddress | str, port: int, protocol: Protocol) -> bool:
        """Whether it is for this destination, as the OPEN has it: an address, or a name in lower case."""
        if protocol != self.protocol or not any(port in ports for ports in self.ports):
            return False
        if not isinstance(self.host, str):
            return not isinstance(host, str) and unwrap(host) in self.host
        if self.host == "*":
            return True
        return isinstance(host, str) and (
            host.endswith(self.host[1:]) if self.host.startswith("*") else host == self.host
        )


def parse_priority(text: str) -> PriorityRule:
    """``PATTERN=CLASS[:WEIGHT]``, with a pattern as ``parse_allow`` reads it, or ``*:PORTS`` for any host.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    pattern, equals, wanted = text.rpartition("=")
    name, colon, weight = wanted.partition(":")
    if not equals or name not in CLASSES:
        raise ConfigurationError(
            f"priority {quote(text)} names no class: write HOST:PORTS=CLASS, with interactive, default or bulk, "
            "as '*:10250=interactive'"
        )
    if colon and not (weight.isascii() and weight.isdigit() and len(weight) <= 3 and 1 <= int(weight) <= 255):
        raise ConfigurationError(f"priority {quote(text)} has no usable weight: write 1 to 255, as {name}:4")
    host, ports, protocol = parse_rule(pattern, any_host=True)
    return PriorityRule(host, ports, protocol, CLASSES.index(name), int(weight) if colon else 1)


def _as_rule(rule: object) -> PriorityRule:
    return object_or_text("priority", rule, PriorityRule, parse_priority, "HOST:PORTS=CLASS, as '*:10250=interactive'")


class Priorities:
    """The rules of one end. The first that fits a destination decides.

    A name is compared as the OPEN has it, and an address with networks only: nothing is resolved for it.

    Args:
        rules: rules, or text for ``parse_priority``.

    Raises:
        ConfigurationError: one of them is neither, or they are not a list.
    """

    def __init__(self, rules: Iterable[PriorityRule | str] = ()) -> None:
        self.rules = tuple(map(_as_rule, listed("priorities", rules, '["*:10250=interactive"]')))

    def of(self, request: StreamType) -> tuple[int, int] | None:
        """Class and weight for a stream; None if no rule is for it, as for types without a destination."""
        if not self.rules or not isinstance(request, (Tcp, Udp)):
            return None
        try:
            host = parse_host(request.host)
        except ConfigurationError:
            return None  # nobody will reach it
        protocol: Protocol = "tcp" if isinstance(request, Tcp) else "udp"
        for rule in self.rules:
            if rule.fits(host, request.port, protocol):
                return rule.priority, rule.weight
        return None
