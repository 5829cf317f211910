"""What a side declares in its HELLO, and the floors that hold before the peer's HELLO is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from konnektor.errors import ConfigurationError, ProtocolError
from konnektor.frames import Feature, HelloTLV, clean_text
from konnektor.limits import Limits

__all__ = ["FLOORS", "Settings"]

_INT: Final = {
    "max_frame": HelloTLV.MAX_FRAME,
    "initial_window": HelloTLV.INITIAL_WINDOW,
    "initial_streams": HelloTLV.INITIAL_STREAMS,
    "features": HelloTLV.FEATURES,
}
_MAX_TEXTS: Final = 3584
"""Room for the texts in a HELLO of at most 4,096 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One side's declaration; it holds for the whole session.

    Attributes:
        max_frame, initial_window, initial_streams, idle_timeout: see ``Limits``.
        features: bits of ``frames.Feature``.
        software: name and version, for logs.
        instance: 16 random bytes of the process, or of the control plane in it, or empty: tells a reconnect from a second
            process, and two ways to one control plane.
        name: what the endpoint calls itself; the certificate decides who it is.
        routes: destinations it claims to serve, as ``host=GLOB``, ``cidr=NET``, ``default``.
        labels: free ``key: value`` pairs.
    """

    max_frame: int
    initial_window: int
    initial_streams: int
    idle_timeout: float
    features: int = 0
    software: str = ""
    instance: bytes = b""
    name: str = ""
    routes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        limits: Limits,
        *,
        software: str = "",
        instance: bytes = b"",
        name: str = "",
        routes: tuple[str, ...] = (),
        labels: Mapping[str, str] | None = None,
        features: int = Feature.DATAGRAM,
    ) -> Settings:
        """The declaration of a side with these limits.

        Raises:
            ConfigurationError: routes and labels do not fit into a HELLO, or hold line breaks.
        """
        settings = cls(
            max_frame=limits.max_frame,
            initial_window=limits.initial_window,
            initial_streams=limits.initial_streams,
            idle_timeout=limits.idle_timeout,
            software=software,
            instance=instance,
            name=name,
            routes=routes,
            labels=dict(labels or {}),
            features=int(features),
        )
        lines = [software, name, *routes, *(f"{key}={value}" for key, value in settings.labels.items())]
        if any("\n" in line for line in lines) or any("=" in key for key in settings.labels):
            raise ConfigurationError("routes, labels and names must not hold line breaks, nor a label's key '='")
        if sum(len(line.encode()) + 1 for line in lines) > _MAX_TEXTS:
            raise ConfigurationError(f"routes and labels take more than {_MAX_TEXTS} bytes: declare fewer")
        return settings

    def to_tlvs(self) -> dict[int, bytes]:
        """HELLO's TLVs; empty ones are left out."""
        tlvs: dict[int, bytes] = {
            int(tlv): getattr(self, name).to_bytes(4, "big") for name, tlv in _INT.items() if getattr(self, name)
        }
        tlvs[HelloTLV.IDLE_TIMEOUT] = round(self.idle_timeout * 1000).to_bytes(4, "big")
        texts = {
            HelloTLV.SOFTWARE: self.software,
            HelloTLV.NAME: self.name,
            HelloTLV.ROUTES: "\n".join(self.routes),
            HelloTLV.LABELS: "\n".join(f"{key}={value}" for key, value in self.labels.items()),
        }
        tlvs.update((int(tlv), text.encode()) for tlv, text in texts.items() if text)
        if self.instance:
            tlvs[HelloTLV.INSTANCE] = self.instance
        return tlvs

    @classmethod
    def from_tlvs(cls, tlvs: Mapping[int, bytes]) -> Settings:
        """A peer's declaration.

        Raises:
            ProtocolError: a setting is below its floor or malformed.
        """

        def number(tlv: HelloTLV, floor: int) -> int:
            raw = tlvs.get(tlv)
            if raw is None:
                return floor
            if len(raw) != 4:
                raise ProtocolError(f"setting {tlv.name} of {len(raw)} bytes, not 4")
            value = int.from_bytes(raw, "big")
            if value < floor:
                raise ProtocolError(f"setting {tlv.name} is {value}, below its floor {floor}")
            return value

        def lines(tlv: HelloTLV) -> list[str]:
            return [clean_text(line) for line in tlvs.get(tlv, b"").split(b"\n") if line]

        instance = tlvs.get(HelloTLV.INSTANCE)
        if instance is not None and len(instance) != 16:
            raise ProtocolError(f"setting INSTANCE of {len(instance)} bytes, not 16")
        return cls(
            max_frame=min(number(HelloTLV.MAX_FRAME, FLOORS.max_frame), 65_535),
            initial_window=number(HelloTLV.INITIAL_WINDOW, FLOORS.initial_window),
            initial_streams=number(HelloTLV.INITIAL_STREAMS, FLOORS.initial_streams),
            idle_timeout=number(HelloTLV.IDLE_TIMEOUT, int(FLOORS.idle_timeout * 1000)) / 1000,
            features=number(HelloTLV.FEATURES, 0),
            software=clean_text(tlvs.get(HelloTLV.SOFTWARE, b"")),
            instance=instance or b"",
            name=clean_text(tlvs.get(HelloTLV.NAME, b"")),
            routes=tuple(lines(HelloTLV.ROUTES)),
            labels=dict(line.partition("=")[::2] for line in lines(HelloTLV.LABELS)),
        )


FLOORS: Final = Settings(max_frame=16_376, initial_window=16 * 1024, initial_streams=8, idle_timeout=30)
"""What every peer takes at least; usable before its HELLO has arrived."""
