"""What lets a session go on over another connection: the frames not yet acknowledged, and the proof of who may.

Theory of operation. Sequenced frames are counted, never numbered: both ends count alike. What was sent
stays here, as it was encoded, until the peer has acknowledged it. When a connection breaks, each side tells
the other how many frames it has taken in, and the rest is sent again, byte for byte (as Eternal Terminal does). The
ticket is the secret that the server gave the client in its HELLO; both sides prove that they hold it, over nonces of
the new connection.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from struct import Struct
from typing import Final

from konnektor.errors import ProtocolError
from konnektor.frames import Buffer, HelloTLV

__all__ = ["KEY_SIZE", "SESSION_ID_SIZE", "Replay", "Ticket"]

SESSION_ID_SIZE: Final = 16
KEY_SIZE: Final = 32
BATCH_COST: Final = 512
"""Bytes of memory that a batch takes beside its frames, here and where its delivery is timed."""
_COUNTS: Final = Struct(">IQ")


class Replay:
    """The batches that were sent, until the peer has acknowledged them: whole, because that is how they are held anyway.

    Bytes are those of sequenced frames, headers included, counted from the session's beginning.

    Attributes:
        sent: in all.
        acked: of these, what the peer has taken in.
    """

    __slots__ = ("_batches", "acked", "sent")

    def __init__(self) -> None:
        self._batches: deque[tuple[int, Sequence[Buffer], int]] = deque()
        self.sent = self.acked = 0

    @property
    def footprint(self) -> int:
        """Bytes of memory that it takes, about: tiny frames cost more than they weigh."""
        return self.sent - self.acked + BATCH_COST * len(self._batches)

    def keep(self, batch: Sequence[Buffer], size: int) -> None:
        """A batch goes out, whose sequenced frames are its last ``size`` bytes."""
        self.sent += size
        self._batches.append((self.sent, batch, size))

    def release(self, acked: int) -> None:
        """The peer has taken in ``acked`` bytes in all."""
        self.acked = acked
        batches = self._batches
        while batches and batches[0][0] <= acked:
            batches.popleft()

    def rest(self, acked: int) -> Iterator[bytes]:
        """What is to be sent again: whole frames, in order, of one batch at a time.

        Each is joined when its turn comes: together they would be a second copy of everything.
        """
        # Not as an expression: compiled by mypyc, that would be a list.
        for end, batch, size in list(self._batches):
            if end > acked:
                yield b"".join(batch)[-min(size, end - acked) :]


class Ticket:
    """The right to go on with a session.

    Attributes:
        session_id: names the session; 16 bytes.
        attempt: of the last attempt that was made (client) or granted (server); they only rise, so that none is
            taken twice.
    """

    __slots__ = ("_key", "attempt", "session_id")

    def __init__(self, session_id: bytes, key: bytes) -> None:
        self.session_id = session_id
        self._key = key
        self.attempt = 0

    @classmethod
    def from_tlvs(cls, tlvs: Mapping[int, bytes]) -> Ticket | None:
        """What a server's HELLO grants, if anything.

        Raises:
            ProtocolError: malformed.
        """
        if HelloTLV.SESSION_ID not in tlvs and HelloTLV.RESUME_KEY not in tlvs:
            return None
        session_id, key = tlvs.get(HelloTLV.SESSION_ID, b""), tlvs.get(HelloTLV.RESUME_KEY, b"")
        if len(session_id) != SESSION_ID_SIZE or len(key) != KEY_SIZE:
            raise ProtocolError(f"a session id of {len(session_id)} bytes with a key of {len(key)}, not 16 and 32")
        return cls(session_id, key)

    @property
    def key(self) -> bytes:
        """The secret, 32 bytes; goes into the server's HELLO and nowhere else."""
        return self._key

    def client_mac(self, attempt: int, rx_seq: int, nonces: bytes) -> bytes:
        """What RESUME proves; ``nonces`` are the client's and the server's, of the new connection."""
        return self._mac(b"konnektor resume client", self.session_id + _COUNTS.pack(attempt, rx_seq) + nonces)

    def server_mac(self, attempt: int, rx_seq: int, nonces: bytes) -> bytes:
        """What RESUMED proves."""
        return self._mac(b"konnektor resume server", self.session_id + _COUNTS.pack(attempt, rx_seq) + nonces)

    def _mac(self, label: bytes, data: bytes) -> bytes:
        return hmac.digest(self._key, label + data, "sha256")
