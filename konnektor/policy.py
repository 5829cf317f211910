"""Who may reach what: allow rules, and the two checks that every dial passes.

A destination is checked before its name is resolved (``AllowList.check_name``), and again for each address that the
name resolved to (``AllowList.check_address``); only an address that passed is dialed, so a name that changes its
mind between the two (DNS rebinding) gains nothing.

- A name rule allows that name only, whatever ordinary address it has.
- An address or CIDR rule allows those addresses, asked for directly or by any name.
- A rule is for TCP, unless it says ``udp:``; one for both would open more than was asked for.
- Addresses that reach the worker itself, its link, its cloud's metadata, or many hosts at once stay shut unless a
  rule *inside* that range names them: ``0.0.0.0/0`` does not open ``127.0.0.1``, ``127.0.0.0/8`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from konnektor.addresses import (
    IPAddress,
    IPNetwork,
    Protocol,
    format_hostport,
    format_hosts,
    format_ports,
    format_protocol,
    parse_host,
    parse_network,
    parse_ports,
    quote,
    split_port,
    split_protocol,
    unwrap,
)
from konnektor.arguments import listed, named, object_or_text
from konnektor.errors import ConfigurationError, DeniedError

__all__ = ["AllowList", "AllowRule", "parse_allow", "parse_grant_from", "parse_rule", "tcp", "udp"]

_RULES: Final = """["10.0.0.0/8:80,443"] or [tcp("10.0.0.0/8", "80,443")]"""

_SPECIAL_V4: Final = (
    ("0.0.0.0/8", "unspecified"),  # Linux connects 0.0.0.0 to itself
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),  # with the metadata service of most clouds, 169.254.169.254
    ("100.100.100.200/32", "cloud metadata"),
    ("168.63.129.16/32", "cloud metadata"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
)
_SPECIAL_V6: Final = (
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::/96", "IPv4-compatible"),  # deprecated by RFC 4291 section 2.5.5.1
    ("64:ff9b:1::/48", "local-use NAT64"),  # RFC 8215: where the IPv4 address is in it, only its translator knows
    ("2001::/32", "Teredo"),  # RFC 4380: two IPv4 addresses, of which one is disguised
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),  # deprecated by RFC 3879
    ("fd00:ec2::254/128", "cloud metadata"),
    ("fd20:ce::254/128", "cloud metadata"),
    ("ff00::/8", "multicast"),
)


def _special_ranges() -> tuple[tuple[IPNetwork, str], ...]:
    ranges: list[tuple[IPNetwork, str]] = [(IPv6Network(text), kind) for text, kind in _SPECIAL_V6]
    for text, kind in _SPECIAL_V4:
        network = IPv4Network(text)
        embedded, length = int(network.network_address), network.prefixlen
        ranges += [
            (network, kind),
            # The same hosts seen through a translator: NAT64 (RFC 6052), IPv4-translated (RFC 2765 section 2.1) and
            # 6to4 (RFC 3056).
            (IPv6Network((0x64FF9B << 96 | embedded, 96 + length)), kind),
            (IPv6Network((0xFFFF << 48 | embedded, 96 + length)), kind),
            (IPv6Network((0x2002 << 112 | embedded << 80, 16 + length)), kind),
        ]
    ranges.sort(key=lambda item: item[0].prefixlen, reverse=True)
    return tuple(ranges)


_SPECIAL: Final = _special_ranges()


@lru_cache(maxsize=4096)
def _special(address: IPAddress) -> tuple[IPNetwork, str] | None:
    """The narrowest special range that the address is in."""
    return next((item for item in _SPECIAL if address in item[0]), None)


@dataclass(frozen=True, slots=True)
class AllowRule:
    """One permission: a name, a ``*.suffix`` or a network, and its ports. ``parse_allow``, ``tcp`` and ``udp`` make them.

    Attributes:
        host: a network, a DNS name in lower case, or a name that starts with ``*.``.
        ports: the ports, as ranges.
        protocol: ``tcp`` or ``udp``.
    """

    host: IPNetwork | str
    ports: tuple[range, ...]
    protocol: Protocol = "tcp"

    def __str__(self) -> str:
        return f"{format_protocol(self.protocol)}{format_hosts(self.host)}:{format_ports(self.ports)}"

    def covers_port(self, port: int, protocol: Protocol = "tcp") -> bool:
        """Whether the port is one of the rule's."""
        return protocol == self.protocol and any(port in ports for ports in self.ports)

    def names(self, name: str) -> bool:
        """Whether this is a name rule for the name (lower case, no trailing dot)."""
        if not isinstance(self.host, str):
            return False
        return name.endswith(self.host[1:]) if self.host.startswith("*") else name == self.host

    def opens(self, address: IPAddress) -> bool:
        """Whether this is a network rule for the address: for a special address, one inside its special range."""
        if isinstance(self.host, str) or address not in self.host:
            return False
        special = _special(address)
        return special is None or self.host.prefixlen >= special[0].prefixlen


def tcp(host: str, ports: int | str) -> AllowRule:
    """A rule from Python: ``tcp("127.0.0.1", 10250)``, ``tcp("10.0.0.0/8", "1-65535")``, ``tcp("*.example", "*")``.

    Args:
        host: an exact name, ``*.suffix``, an IP address, or a CIDR; brackets around IPv6 may stand or not.
        ports: one port, or text: ``*``, ``80,443``, ``8000-8100``, or several of these with commas.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    return _rule(host, ports, "tcp")


def udp(host: str, ports: int | str) -> AllowRule:
    """A rule for UDP; arguments and errors as ``tcp``."""
    return _rule(host, ports, "udp")


def _rule(host: str, ports: int | str, protocol: Protocol) -> AllowRule:
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return AllowRule(_parse_rule_host(host), parse_ports(str(ports)), protocol)


def parse_allow(text: str) -> AllowRule:
    """``HOST-OR-CIDR:PORTS``, such as ``10.0.0.0/8:80,443``, ``*.svc.example:*`` or ``[::1]:8000-8100``.

    With ``udp:`` in front it is a rule for UDP, else for TCP.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    return AllowRule(*parse_rule(text))


def parse_rule(text: str, *, any_host: bool = False) -> tuple[IPNetwork | str, tuple[range, ...], Protocol]:
    """Hosts, ports and protocol of a rule of any kind.

    Args:
        text: as for ``parse_allow``.
        any_host: whether ``*`` may stand for every host, where nothing is opened by it.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    protocol, destination = split_protocol(text)
    try:
        host, ports = split_port(destination)
    except ConfigurationError:
        raise ConfigurationError(
            f"rule {quote(text)} is not HOST:PORTS: write it as 10.0.0.0/8:80,443 or db.example:5432 or [::1]:*"
        ) from None
    return host if any_host and host == "*" else _parse_rule_host(host), parse_ports(ports), protocol


def parse_grant_from(grant: object) -> tuple[str, AllowRule]:
    """What the worker NAME may reach at the control plane's end: ``NAME=RULE``, or (name, rule), the rule being one or its text.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    return named(grant, _as_rule, "HOST:PORTS", "node-1=10.0.0.1:6443", '("node-1", tcp("10.0.0.1", 6443))')


def _as_rule(rule: object) -> AllowRule:
    return object_or_text("rule", rule, AllowRule, parse_allow, _RULES)


def _parse_rule_host(text: str) -> IPNetwork | str:
    if text == "*":
        raise ConfigurationError("host '*' says nothing: write 0.0.0.0/0 and [::/0] for all ordinary addresses")
    if text.startswith("*."):
        suffix = parse_host(text[2:])
        if not isinstance(suffix, str):
            raise ConfigurationError(f"host {quote(text)} puts '*.' before an address: write a CIDR")
        return "*." + suffix
    return parse_network(text)


_MOST_ALLOWED: Final = 1024
"""Destinations that a list remembers, half a megabyte at most: what they are is the peer's choice."""


class AllowList:
    """The rules of one end, and the two checks. An empty list allows nothing.

    The reasons in the errors are for this side's log; the peer is told only the code.

    Args:
        rules: rules, or text for ``parse_allow``.

    Raises:
        ConfigurationError: one of them is neither, or they are not a list.
    """

    def __init__(self, rules: Iterable[AllowRule | str] = ()) -> None:
        self._rules = tuple(map(_as_rule, listed("allow", rules, _RULES)))
        self._allowed: set[tuple[str, int, Protocol]] = set()
        """What ``check_name`` has let pass: the rules never change."""

    @property
    def rules(self) -> tuple[AllowRule, ...]:
        """As given."""
        return self._rules

    def check_name(self, host: str, port: int, protocol: Protocol = "tcp") -> None:
        """First stage, before resolving: refuses what no resolved address could make acceptable.

        For an IP address this is the whole check.

        Raises:
            DeniedError: no rule can allow it, or the host is neither a strict IP address nor a DNS name.
        """
        asked = (host, port, protocol)
        if asked in self._allowed:
            return
        wanted = _parse_wanted(host)
        if not isinstance(wanted, str):
            self._check(wanted, wanted, port, protocol)
        elif not any(
            rule.covers_port(port, protocol) and (rule.names(wanted) or not isinstance(rule.host, str))
            for rule in self._rules
        ):
            raise DeniedError(f"no rule allows {format_protocol(protocol)}{format_hostport(wanted, port)}")
        if len(self._allowed) >= _MOST_ALLOWED:
            self._allowed.clear()
        self._allowed.add(asked)

    def check_address(self, host: str, address: IPAddress | str, port: int, protocol: Protocol = "tcp") -> None:
        """Second stage, for an address that the host resolved to; dial this address and no other.

        Raises:
            DeniedError: no rule allows the host at this address.
        """
        self._check(_parse_wanted(host), ip_address(address), port, protocol)

    def checker(self, host: str, port: int, protocol: Protocol = "tcp") -> Callable[[IPAddress], None]:
        """``check_address`` for one destination, as ``dial`` takes it."""
        wanted = _parse_wanted(host)
        return lambda address: self._check(wanted, address, port, protocol)

    def _check(self, wanted: IPAddress | str, address: IPAddress, port: int, protocol: Protocol) -> None:
        address = unwrap(address)
        special = _special(address)
        for rule in self._rules:
            if rule.covers_port(port, protocol) and (
                rule.opens(address) or (special is None and isinstance(wanted, str) and rule.names(wanted))
            ):
                return
        at = format_hostport(address, port)
        seen = format_protocol(protocol) + (f"{wanted} at {at}" if isinstance(wanted, str) else at)
        if special is None:
            raise DeniedError(f"no rule allows {seen}")
        raise DeniedError(f"no rule inside {special[0]} allows {seen}, a {special[1]} address")


def _parse_wanted(host: str) -> IPAddress | str:
    try:
        return parse_host(host)
    except ConfigurationError:
        raise DeniedError(f"host {quote(host)} is neither an IP address nor a DNS name") from None
