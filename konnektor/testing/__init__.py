"""For tests, yours too: certificates, sessions joined in memory, and a proxy that delays and breaks connections."""

from konnektor.testing.authority import Certificates, certificates
from konnektor.testing.memory import memory_session_pair
from konnektor.testing.proxy import FaultProxy, ProxiedConnection, ProxyStats, Side, delaying_relay

__all__ = [
    "Certificates",
    "FaultProxy",
    "ProxiedConnection",
    "ProxyStats",
    "Side",
    "certificates",
    "delaying_relay",
    "memory_session_pair",
]
