"""Stream types: what an OPEN asks for, as a class.

A type is a ``msgspec`` struct: its fields travel in OPEN as a MessagePack map and are checked on
arrival. Subclass ``StreamType`` to add one; a name of your own is ``NAME@DOMAIN``, with a domain that
is yours, and needs no registry::

    class Exec(StreamType):
        name = "exec@acme.example"
        argv: list[str]
        tty: bool = False
"""

from __future__ import annotations

import re
from functools import lru_cache
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self, cast, dataclass_transform

import msgspec

from konnektor.addresses import parse_host
from konnektor.errors import ConfigurationError

__all__ = ["StreamType", "Tcp", "Udp", "check_request", "check_type"]

_MISFIT: Final = re.compile(r"Expected (.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)
"""How msgspec says what does not fit, and in which field."""
_ORDINARY: Final = 300
"""Bytes of a header with the longest host that there may be, and nothing else worth keeping."""
_NAME: Final = re.compile(r"[a-z0-9][-a-z0-9._]{0,62}(@[a-z0-9][-a-z0-9.]{0,190})?")


if TYPE_CHECKING:

    @dataclass_transform(field_specifiers=(msgspec.field,))
    class _Meta(msgspec.StructMeta):
        """PEP 681: what names this as its metaclass is neither frozen nor not; subclasses need not say ``frozen``."""

else:
    _Meta = type(msgspec.Struct)


class StreamType(msgspec.Struct, metaclass=_Meta, frozen=True, omit_defaults=True):
    """Base of all stream types.

    Fields that a peer does not know are ignored, and missing ones take their defaults, so a type can grow.

    Attributes:
        name: what OPEN calls it; a base of other types needs none.
        priority: class its streams start in: 0 interactive, 1 default, 2 bulk.
        datagrams: whether its streams carry datagrams beside their bytes; both peers must say the same.
        repeatable: whether a request may as well be made twice if nothing was sent after it, as one to connect may. If the
            connection breaks before the answer, only then is the error ``retryable``.

    Raises:
        ConfigurationError: by the ``class`` statement: one of these is not what it must be.
    """

    name: ClassVar[str] = ""
    priority: ClassVar[int] = 1
    datagrams: ClassVar[bool] = False
    repeatable: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute, example in (
            ("name", '"exec@acme.example"'),
            ("priority", "2"),
            ("datagrams", "True"),
            ("repeatable", "True"),
        ):
            if isinstance(getattr(cls, attribute), MemberDescriptorType):
                raise ConfigurationError(
                    f"{cls.__name__}.{attribute} has an annotation, which makes it a field of each request: "
                    f"write {attribute} = {example} without one, or with ClassVar"
                )
        if cls.name != "":
            cls.check()
        if cls.priority not in {0, 1, 2}:
            raise ConfigurationError(
                f"{cls.__name__}.priority is {cls.priority!r}; write 0 for interactive, 1 for default or 2 for bulk"
            )

    def encode(self) -> bytes:
        """The header for OPEN.

        Raises:
            ConfigurationError: a field is not what its annotation says, and the peer would refuse it; the text names it.
        """
        name = type(self).__name__
        try:
            header = msgspec.msgpack.encode(self)
            msgspec.msgpack.decode(header, type=type(self))
        except msgspec.ValidationError as error:
            found = _MISFIT.fullmatch(str(error))
            if found is None:
                raise ConfigurationError(f"{name} cannot be sent: {error}") from None
            wanted = found[1].replace(", got ", ", not ")
            raise ConfigurationError(f"{name}.{found[2]} takes {wanted}") from None
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigurationError(f"{name} cannot be sent: {error}") from None
        return header

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """The request in a peer's OPEN.

        Raises:
            ValueError: the header does not fit the type.
        """
        try:
            return msgspec.msgpack.decode(header, type=cls)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(f"malformed {cls.name} header: {error}") from None

    @classmethod
    def check(cls) -> None:
        """Raises ConfigurationError if the class cannot travel."""
        name: object = cls.name
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{cls.__name__}.name is {name!r}; write NAME@DOMAIN in lower case, for example 'exec@acme.example'"
            )


def check_type(request: object) -> None:
    """Raises ConfigurationError if this is no class whose requests can travel."""
    if not (isinstance(request, type) and issubclass(request, StreamType)):
        raise ConfigurationError(f"a stream type is a subclass of StreamType, not {_kind(request)}")
    request.check()


def check_request(request: object) -> None:
    """Raises ConfigurationError if this is no request that can travel; its fields are ``encode``'s business."""
    if not isinstance(request, StreamType):
        name = request.__name__ if isinstance(request, type) else "Tcp"
        raise ConfigurationError(
            f"a request is an instance of a subclass of StreamType, not {_kind(request)}: write {name}(...)"
        )
    if not request.name:  # any other was checked with its class
        request.check()


def _kind(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"an instance of {type(given).__name__}"


class _Destination(StreamType, frozen=True):
    """``host`` is a name or an address, resolved by the accepting end."""

    repeatable: ClassVar[bool] = True
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]

    def encode(self) -> bytes:
        kind = type(self)
        if kind.__base__ is _Destination and type(self.host) is str and type(self.port) is int:
            return _header(kind, self.host, self.port)
        header = super().encode()  # which may say what they must be
        parse_host(self.host)
        return header

    @classmethod
    def decode(cls, header: bytes) -> Self:
        if cls.__base__ is _Destination and len(header) <= _ORDINARY:
            return cast(Self, _request(cls, header))
        return super().decode(header)


@lru_cache(maxsize=1024)
def _request(kind: type[_Destination], header: bytes) -> _Destination:
    """What the same header was decoded to before, most likely: it cannot be changed."""
    return super(_Destination, kind).decode(header)


@lru_cache(maxsize=1024)
def _header(kind: type[_Destination], host: str, port: int) -> bytes:
    """Of a request that most likely was made before: many clients want the same."""
    header = StreamType.encode(kind(host, port))
    parse_host(host)  # of what is neither name nor address the peer would say no more than DENIED
    return header


class Tcp(_Destination, frozen=True):
    """A TCP connection that the accepting end dials; ``host`` is a name or an address, resolved there."""

    name: ClassVar[str] = "tcp"


class Udp(_Destination, frozen=True):
    """A UDP socket at the accepting end, connected to ``host:port``: one datagram is one packet, either way."""

    name: ClassVar[str] = "udp"
    datagrams: ClassVar[bool] = True
