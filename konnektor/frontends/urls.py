"""Where a frontend listens, from its URL."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import ClassVar, Final, TypeAlias
from urllib.parse import unquote, urlsplit

from konnektor.addresses import format_hostport, parse_hostport, quote
from konnektor.errors import ConfigurationError

__all__ = ["Frontend", "HttpFrontend", "HttpsFrontend", "UnixFrontend", "is_loopback", "parse_frontend"]

MAX_PATH: Final = 107
"""Bytes of a Unix socket's path: ``sun_path`` of unix(7), less its NUL."""


@dataclass(frozen=True, slots=True)
class HttpFrontend:
    """Plaintext CONNECT on a loopback address."""

    kind: ClassVar[str] = "http"
    host: str
    port: int

    def __str__(self) -> str:
        return f"http://{format_hostport(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class UnixFrontend:
    """Plaintext CONNECT on a Unix socket, whose permissions are the authentication."""

    kind: ClassVar[str] = "unix"
    path: str

    def __str__(self) -> str:
        return f"http+unix://{self.path}"


@dataclass(frozen=True, slots=True)
class HttpsFrontend:
    """CONNECT over TLS with client certificates, as kube-apiserver does it."""

    kind: ClassVar[str] = "https"
    host: str
    port: int
    cert: str
    key: str
    client_ca: str

    def __str__(self) -> str:
        return f"https://{format_hostport(self.host, self.port)}"


Frontend: TypeAlias = HttpFrontend | UnixFrontend | HttpsFrontend


def parse_frontend(url: str) -> Frontend:
    """``http://HOST:PORT``, ``http+unix:///PATH`` or ``https://HOST:PORT?cert=F&key=F&client-ca=F``.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme == "http+unix":
        path = unquote(parts.path, errors="surrogateescape")
        # Printable: the ready line and the log are lines of UTF-8, which has no surrogates.
        if (
            parts.netloc
            or not path.startswith("/")
            or parts.query
            or not path.isprintable()
            or len(path.encode()) > MAX_PATH
        ):
            raise ConfigurationError(
                f"frontend {quote(url)} has no usable path: write http+unix:///run/konnektor/connect.sock, "
                f"at most {MAX_PATH} bytes of UTF-8, without control characters"
            )
        return UnixFrontend(path)
    if parts.scheme not in ("http", "https") or parts.path not in ("", "/") or parts.fragment:
        raise ConfigurationError(
            f"frontend {quote(url)} is unknown: write http://127.0.0.1:8080, http+unix:///PATH "
            "or https://HOST:PORT?cert=F&key=F&client-ca=F"
        )
    try:
        host, port = parse_hostport(parts.netloc, zero=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"frontend {quote(url)}: {error}") from None
    # Not parse_qsl, which reads a plus sign as a space: these are names of files.
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = {unquote(name): unquote(value) for name, _, value in pairs}
    if parts.scheme == "http":
        if query:
            raise ConfigurationError(f"frontend {quote(url)}: http takes no parameters; for TLS write https://")
        if not is_loopback(host):
            raise ConfigurationError(
                f"frontend {quote(url)} would serve anyone in plaintext: use a loopback address, a Unix socket or https"
            )
        return HttpFrontend(host, port)
    missing = [name for name in ("cert", "key", "client-ca") if not query.get(name)]
    unknown = [name for name in query if name not in ("cert", "key", "client-ca")]
    if missing or unknown or len(query) < len(pairs):
        fault = (
            f"lacks {', '.join(missing)}" if missing
            else f"has an unknown parameter {quote(unknown[0])}" if unknown
            else "has a parameter twice"
        )  # fmt: skip
        raise ConfigurationError(f"frontend {quote(url)} {fault}: write https://HOST:PORT?cert=F&key=F&client-ca=F")
    return HttpsFrontend(host, port, query["cert"], query["key"], query["client-ca"])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there, as far as the text of the host tells."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
