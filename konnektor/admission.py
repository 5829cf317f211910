"""Who may open how many streams, and under which ids: the counts behind OPEN and STREAMS."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from konnektor.errors import ProtocolError
from konnektor.frames import MAX_OPENS
from konnektor.settings import FLOORS

__all__ = ["LAST_ID", "Admission", "Role"]

Role: TypeAlias = Literal["client", "server"]

LAST_ID: Final = 2**31 - 2**20
"""Ids end here; whoever reaches it drains, so that the client dials a new session."""


class Admission:
    """Stream ids and numbers of OPENs, both ways; all of them only ever rise (RFC 9000 section 4.6).

    A slot of the peer's comes back when its stream has *retired*: it is forgotten on the wire, its
    handler is gone and nothing of it is unread. So opening and resetting in a hurry gains nobody anything.

    Attributes:
        next_id, next_peer_id: of the next OPEN, ours and the peer's.
        allowed: OPENs we may send, in all.
        opened: OPENs we sent.
        granted: OPENs the peer may send, in all, as far as it has been told.
        taken: OPENs of the peer that came.
        retired: of these, how many streams are gone.
    """

    __slots__ = ("_slots", "allowed", "granted", "next_id", "next_peer_id", "opened", "retired", "taken")

    def __init__(self, role: Role, slots: int) -> None:
        self._slots = slots
        self.next_id, self.next_peer_id = (1, 2) if role == "client" else (2, 1)
        self.allowed = FLOORS.initial_streams
        self.opened = 0
        self.granted = slots
        self.taken = 0
        self.retired = 0

    def is_ours(self, stream_id: int) -> bool:
        """Whether this side gives out ids of that parity."""
        return stream_id & 1 == self.next_id & 1

    def was_opened(self, stream_id: int) -> bool:
        """Whether there ever was such a stream."""
        return stream_id < (self.next_id if self.is_ours(stream_id) else self.next_peer_id)

    @property
    def opens(self) -> int:
        """OPENs of both sides that were on the wire."""
        return self.opened + self.taken

    @property
    def may_open(self) -> bool:
        """Whether the peer lets us send one more OPEN."""
        return self.opened < self.allowed

    @property
    def exhausted(self) -> bool:
        """Whether our ids have run out."""
        return self.next_id >= LAST_ID

    @property
    def last_taken(self) -> int:
        """The newest id of the peer, 0 if there is none."""
        return max(0, self.next_peer_id - 2)

    def open(self) -> int:
        """The id for an OPEN that is sent now."""
        stream_id = self.next_id
        self.next_id += 2
        self.opened += 1
        return stream_id

    def allow(self, opens: int) -> bool:
        """Takes in a STREAMS; a lower one is ignored. True if it raised the limit.

        Raises:
            ProtocolError: more than there are ids.
        """
        if opens > MAX_OPENS:
            raise ProtocolError(f"STREAMS of {opens}, more than there are ids")
        if opens <= self.allowed:
            return False
        self.allowed = opens
        return True

    def take(self, stream_id: int) -> None:
        """An OPEN of the peer came.

        Raises:
            ProtocolError: not the next id, or beyond what was granted.
        """
        if stream_id != self.next_peer_id:
            raise ProtocolError(f"OPEN of stream {stream_id}; the next one is {self.next_peer_id}")
        if self.taken >= self.granted:
            raise ProtocolError(f"OPEN number {self.taken + 1}; {self.granted} were allowed")
        self.next_peer_id += 2
        self.taken += 1

    def retire(self) -> None:
        """A stream of the peer is gone."""
        self.retired += 1

    @property
    def grant_due(self) -> bool:
        """Whether a STREAMS is worth sending: an eighth came back, or something did and few are left.

        To be asked when a stream is gone, and when one came: the last few may all be wanted at once.
        """
        slots = self._slots
        back = slots + self.retired - self.granted
        return back >= max(1, slots >> 3) or (back > 0 and self.granted - self.taken < slots >> 2)

    def grant(self) -> int:
        """The number for a STREAMS that is sent now."""
        self.granted = min(MAX_OPENS, self._slots + self.retired)
        return self.granted

    def assert_invariants(self) -> None:
        """For tests: nobody is over their limit."""
        assert self.opened <= self.allowed
        assert self.retired <= self.taken <= self.granted <= self._slots + self.retired
