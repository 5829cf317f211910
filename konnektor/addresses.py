"""Text of hosts, networks, ports and names, read strictly: each text has one meaning, or it is refused.

What one program takes for a name and the next for an address (``127.1``, ``0x7f000001``, ``2130706433``,
``010.0.0.1``, ``fe80::1%eth0``) is how requests slip past an allow list, so none of these is accepted here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Literal, NamedTuple, TypeAlias

from konnektor.errors import ConfigurationError

__all__ = [
    "Forward",
    "IPAddress",
    "IPNetwork",
    "Protocol",
    "canonical_host",
    "format_hostport",
    "format_hosts",
    "format_ports",
    "format_protocol",
    "parse_forward",
    "parse_host",
    "parse_hostport",
    "parse_network",
    "parse_port",
    "parse_ports",
    "parse_worker_name",
    "quote",
    "split_port",
    "split_protocol",
    "unwrap",
    "unwrap_network",
]

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network
Protocol: TypeAlias = Literal["tcp", "udp"]

_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_WORKER_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
# RFC 1123 section 2.1, plus the underscore that service discovery and compose files use.
_LABEL: Final = re.compile(r"[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?")
# A name that ends so is an IPv4 address to inet_aton and to browsers (WHATWG URL, "ends in a number").
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_ANY_PORT: Final = range(1, 65536)
_URL: Final = re.compile(r"[A-Za-z][-+.A-Za-z0-9]{0,15}://")
_MAX_NAME: Final = 253
_MAX_QUOTED: Final = 80


class Forward(NamedTuple):
    """A fixed forward: where to listen, and what a worker dials for each connection, or each sender of datagrams."""

    listen_host: str
    listen_port: int
    worker: str
    host: str
    port: int
    protocol: Protocol = "tcp"

    def __str__(self) -> str:
        return (
            f"{format_protocol(self.protocol)}{format_hostport(self.listen_host, self.listen_port)}"
            f"={self.worker}/{format_hostport(self.host, self.port)}"
        )


def quote(text: str) -> str:
    """The text as it may stand in a log line or an error: in quotes, escaped, of bounded length."""
    return ascii(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


@lru_cache(maxsize=1024)
def parse_host(text: str) -> IPAddress | str:
    """An address, or a DNS name in lower case without its trailing dot.

    IPv6 stands without brackets. Addresses come back as written: see ``unwrap`` for IPv4-mapped ones.

    Raises:
        ConfigurationError: neither a strict IP address nor a valid DNS name.
    """
    try:
        address = ip_address(text)
    except ValueError:
        pass
    else:
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise ConfigurationError(f"address {quote(text)} has a scope id: write the address without it")
        return address
    name = text.lower().removesuffix(".")
    if not text.isascii():
        raise ConfigurationError(f"name {quote(text)} is not ASCII: write its xn-- form")
    labels = name.split(".")
    if len(name) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels) or _NUMBER.fullmatch(labels[-1]):
        raise ConfigurationError(
            f"host {quote(text)} is neither an IP address nor a DNS name: write one such as 10.0.0.7, ::1 or db.example"
        )
    return name


def canonical_host(text: str) -> str:
    """The one spelling of a host: an address in its shortest form, a name in lower case.

    A trailing dot is kept: it tells resolvers not to search. ``parse_host`` drops it for comparing.

    Raises:
        ConfigurationError: see ``parse_host``.
    """
    host = parse_host(text)
    return host + "." if isinstance(host, str) and text.endswith(".") else str(host)


def parse_network(text: str) -> IPNetwork | str:
    """A network from an IP address or CIDR (IPv4-mapped ones unwrapped), else a DNS name as ``parse_host`` gives it.

    Raises:
        ConfigurationError: none of these; a CIDR with host bits set or an impossible prefix length.
    """
    base, slash, prefix = text.partition("/")
    host = parse_host(base)
    if isinstance(host, str):
        if slash:
            raise ConfigurationError(f"network {quote(text)} is not a CIDR: write one such as 10.0.0.0/8 or fd00::/8")
        return host
    if not slash:
        return unwrap_network(ip_network(host))
    if not (prefix.isascii() and prefix.isdigit() and len(prefix) <= 3 and int(prefix) <= host.max_prefixlen):
        raise ConfigurationError(
            f"network {quote(text)} has no usable prefix length: write 0 to {host.max_prefixlen} after the slash"
        )
    network = ip_network((host, int(prefix)), strict=False)
    if network.network_address != host:
        raise ConfigurationError(f"network {quote(text)} has host bits set: write {network}")
    return unwrap_network(network)


def unwrap(address: IPAddress) -> IPAddress:
    """The IPv4 address inside an IPv4-mapped one (RFC 4291 section 2.5.5.2): dialing either reaches the same host."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def unwrap_network(network: IPNetwork) -> IPNetwork:
    """The IPv4 network that an IPv4-mapped network stands for; any other as it is."""
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def parse_port(text: str, *, zero: bool = False) -> int:
    """A port number, 1 to 65535, or from 0 with ``zero``.

    Raises:
        ConfigurationError: not such a number.
    """
    if text.isascii() and text.isdigit() and len(text) <= 5 and (not zero) <= int(text) <= 65535:
        return int(text)
    raise ConfigurationError(f"port {quote(text)} is not a number from {int(not zero)} to 65535")


def parse_ports(text: str) -> tuple[range, ...]:
    """``*``, ``80,443``, ``8000-8100``, or several of these with commas.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    return tuple(_parse_port_range(part) for part in text.split(","))


def _parse_port_range(text: str) -> range:
    if text == "*":
        return _ANY_PORT
    first, dash, last = text.partition("-")
    try:
        low = parse_port(first)
        high = parse_port(last) if dash else low
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}: write ports as *, 80,443 or 8000-8100") from None
    if high < low:
        raise ConfigurationError(f"ports {quote(text)} run backwards: write {high}-{low}")
    return range(low, high + 1)


def parse_hostport(text: str, *, zero: bool = False) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT`` as a canonical host (IPv6 without brackets) and a port.

    Args:
        text: the text.
        zero: whether port 0 (any free port) is acceptable.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    host, port = split_port(text)
    if text.startswith("[") and ":" not in host:
        raise ConfigurationError(
            f"address {quote(text)} has brackets around what is not IPv6: write them for IPv6 only"
        )
    return canonical_host(host), parse_port(port, zero=zero)


def split_port(text: str) -> tuple[str, str]:
    """The text before and after the colon of the port, IPv6 taken out of its brackets; neither is checked further.

    Raises:
        ConfigurationError: no port, no host, a URL, or IPv6 without brackets.
    """
    if scheme := _URL.match(text):
        raise ConfigurationError(f"address {quote(text)} is a URL: write HOST:PORT, without {scheme[0]}")
    if text.startswith("["):
        host, separator, port = text[1:].partition("]:")
    else:
        host, separator, port = text.rpartition(":")
        if ":" in host:
            raise ConfigurationError(
                f"address {quote(text)} has too many colons: write IPv6 in brackets, as [::1]:8443"
            )
    if not separator or not host:
        raise ConfigurationError(f"address {quote(text)} lacks a host or a port: write 127.0.0.1:8443 or [::1]:8443")
    return host, port


def split_protocol(text: str) -> tuple[Protocol, str]:
    """``udp:HOST:PORT`` or ``tcp:HOST:PORT`` without its protocol; what has none is TCP.

    ``udp:53`` has none: it is port 53 of a host named udp.
    """
    protocol, _, rest = text.partition(":")
    if ":" in rest:
        if protocol == "udp":
            return "udp", rest
        if protocol == "tcp":
            return "tcp", rest
    return "tcp", text


def format_protocol(protocol: Protocol) -> str:
    """What stands in front of an address: nothing for TCP."""
    return "" if protocol == "tcp" else f"{protocol}:"


def format_hostport(host: str | IPAddress, port: int) -> str:
    """``HOST:PORT``, with brackets around IPv6."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def format_hosts(hosts: IPNetwork | str) -> str:
    """A network or a pattern of names as ``split_port`` takes it: one address without its length, IPv6 in brackets."""
    if isinstance(hosts, str):
        return hosts
    text = str(hosts.network_address if hosts.prefixlen == hosts.max_prefixlen else hosts)
    return f"[{text}]" if ":" in text else text


def format_ports(ports: tuple[range, ...]) -> str:
    """Ports as ``parse_ports`` takes them."""
    if _ANY_PORT in ports:
        return "*"
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ports)


def parse_worker_name(text: str) -> str:
    """The name of a worker, control plane or client, checked.

    Raises:
        ConfigurationError: not 1 to 63 of ``a-z 0-9 - .``, with a letter or digit at both ends.
    """
    if not _WORKER_NAME.fullmatch(text):
        raise ConfigurationError(
            f"name {quote(text)} is not usable: write 1 to 63 of a-z, 0-9, '-' and '.', "
            "with a letter or digit at both ends"
        )
    return text


def parse_forward(text: str) -> Forward:
    """``LISTEN=WORKER/HOST:PORT``, LISTEN being ``HOST:PORT`` (port 0: any free one); for UDP with ``udp:`` in front.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    listen, equals, target = text.partition("=")
    protocol, listen = split_protocol(listen)
    worker, slash, destination = target.partition("/")
    if not equals or not slash:
        raise ConfigurationError(
            f"forward {quote(text)} is incomplete: write LISTEN=WORKER/HOST:PORT, "
            "such as 127.0.0.1:8080=node-1/10.0.0.7:80"
        )
    try:
        listens = parse_hostport(listen, zero=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"LISTEN of forward {quote(text)}: {error}") from None
    return Forward(*listens, parse_worker_name(worker), *parse_hostport(destination), protocol)
