"""The states of a stream and every transition there is, as tables.

Theory of operation. A stream has two halves, and each end sees one as its *receiving* and one as its
*sending* half. Each has its own small machine; what happens to one half never moves the other but
through a frame. The stream is forgotten when both have ended.

The tables fail closed: what does not stand there is an error: of the peer (STREAM_STATE) where a frame
is the input, of this program (LocalProtocolError) where a call is. ``docs/protocol.md`` draws them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["FINISHING", "RECEIVE", "RECEIVING", "SEND", "SENDING", "Event", "Receiving", "Sending"]


class Receiving(IntEnum):
    """What may still come from the peer."""

    OPEN = 0
    """DATA flows."""
    AWAITING = 1
    """We opened it; the peer has neither accepted nor refused."""
    GIVEN_UP = 2
    """As AWAITING, but we have sent STOP: an ACCEPT that crosses changes nothing for the application."""
    DISCARDING = 3
    """We sent STOP or REFUSE: DATA is counted and thrown away until the RESET or FIN that we are owed."""
    ENDED = 4
    """FIN, RESET or REFUSE came."""


class Sending(IntEnum):
    """What this side may still send."""

    OPEN = 0
    """DATA flows."""
    UNSENT = 1
    """We opened it; OPEN is not on the wire, so the peer knows nothing of it."""
    UNDECIDED = 2
    """The peer opened it; we have neither accepted nor refused."""
    FINISHING = 3
    """FIN follows what is queued."""
    RESETTING = 4
    """The queue is dropped; RESET goes out next."""
    REFUSING = 5
    """REFUSE goes out next."""
    ENDED = 6
    """FIN, RESET or REFUSE is on the wire."""


# For what runs with every frame: an attribute of an enumeration takes longer to look up than such a test may take.
RECEIVING: Final = Receiving.OPEN
SENDING: Final = Sending.OPEN
FINISHING: Final = Sending.FINISHING


class Event(IntEnum):
    """Inputs of the machines: frames of the peer, calls of the application, frames put on the wire."""

    # frames
    DATA = 0
    FIN = 1
    ACCEPT = 2
    REFUSE = 3
    RESET = 4
    STOP = 5
    # calls
    DO_ACCEPT = 6
    DO_REFUSE = 7
    DO_FINISH = 8
    DO_RESET = 9
    DO_STOP = 10
    # frames of ours that are on the wire
    SENT_OPEN = 11
    SENT_END = 12


_R, _S, _E = Receiving, Sending, Event

RECEIVE: Final[dict[tuple[Receiving, Event], Receiving]] = {
    (_R.OPEN, _E.DATA): _R.OPEN,
    (_R.OPEN, _E.FIN): _R.ENDED,
    (_R.OPEN, _E.RESET): _R.ENDED,
    (_R.OPEN, _E.DO_STOP): _R.DISCARDING,
    (_R.OPEN, _E.DO_REFUSE): _R.DISCARDING,
    (_R.AWAITING, _E.ACCEPT): _R.OPEN,
    (_R.AWAITING, _E.REFUSE): _R.ENDED,
    (_R.AWAITING, _E.DO_STOP): _R.GIVEN_UP,
    (_R.GIVEN_UP, _E.ACCEPT): _R.DISCARDING,
    (_R.GIVEN_UP, _E.REFUSE): _R.ENDED,
    (_R.GIVEN_UP, _E.DO_STOP): _R.GIVEN_UP,
    (_R.DISCARDING, _E.DATA): _R.DISCARDING,
    (_R.DISCARDING, _E.FIN): _R.ENDED,
    (_R.DISCARDING, _E.RESET): _R.ENDED,
    (_R.DISCARDING, _E.DO_STOP): _R.DISCARDING,
    (_R.ENDED, _E.DO_STOP): _R.ENDED,
    (_R.ENDED, _E.DO_REFUSE): _R.ENDED,
}

SEND: Final[dict[tuple[Sending, Event], Sending]] = {
    (_S.UNSENT, _E.SENT_OPEN): _S.OPEN,
    (_S.UNSENT, _E.DO_FINISH): _S.UNSENT,
    (_S.UNSENT, _E.DO_RESET): _S.ENDED,
    (_S.UNDECIDED, _E.DO_ACCEPT): _S.OPEN,
    (_S.UNDECIDED, _E.DO_REFUSE): _S.REFUSING,
    (_S.UNDECIDED, _E.DO_RESET): _S.REFUSING,
    (_S.UNDECIDED, _E.STOP): _S.REFUSING,
    (_S.UNDECIDED, _E.RESET): _S.REFUSING,
    (_S.OPEN, _E.DO_FINISH): _S.FINISHING,
    (_S.OPEN, _E.DO_RESET): _S.RESETTING,
    (_S.OPEN, _E.STOP): _S.RESETTING,
    (_S.OPEN, _E.REFUSE): _S.RESETTING,
    (_S.FINISHING, _E.DO_FINISH): _S.FINISHING,
    (_S.FINISHING, _E.SENT_END): _S.ENDED,
    (_S.FINISHING, _E.DO_RESET): _S.RESETTING,
    (_S.FINISHING, _E.STOP): _S.RESETTING,
    (_S.FINISHING, _E.REFUSE): _S.RESETTING,
    (_S.RESETTING, _E.DO_FINISH): _S.RESETTING,
    (_S.RESETTING, _E.DO_RESET): _S.RESETTING,
    (_S.RESETTING, _E.STOP): _S.RESETTING,
    (_S.RESETTING, _E.REFUSE): _S.RESETTING,
    (_S.RESETTING, _E.SENT_END): _S.ENDED,
    (_S.REFUSING, _E.DO_FINISH): _S.REFUSING,
    (_S.REFUSING, _E.DO_RESET): _S.REFUSING,
    (_S.REFUSING, _E.DO_REFUSE): _S.REFUSING,
    (_S.REFUSING, _E.STOP): _S.REFUSING,
    (_S.REFUSING, _E.SENT_END): _S.ENDED,
    (_S.ENDED, _E.DO_FINISH): _S.ENDED,
    (_S.ENDED, _E.DO_RESET): _S.ENDED,
    (_S.ENDED, _E.DO_REFUSE): _S.ENDED,
    (_S.ENDED, _E.STOP): _S.ENDED,
    (_S.ENDED, _E.REFUSE): _S.ENDED,
}
