"""For tests, yours too: sessions joined in memory, and a proxy that delays connections and breaks them on demand."""

from konnektor.testing.memory import memory_session_pair
from konnektor.testing.proxy import FaultProxy, ProxiedConnection, ProxyStats, Side, delaying_relay

__all__ = [
    "FaultProxy",
    "ProxiedConnection",
    "ProxyStats",
    "Side",
    "delaying_relay",
    "memory_session_pair",
]
