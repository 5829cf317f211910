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

__all__ = [
    "EVENT_ACCEPT",
    "EVENT_DATA",
    "EVENT_DO_ACCEPT",
    "EVENT_DO_FINISH",
    "EVENT_DO_REFUSE",
    "EVENT_DO_RESET",
    "EVENT_DO_STOP",
    "EVENT_FIN",
    "EVENT_REFUSE",
    "EVENT_RESET",
    "EVENT_SENT_END",
    "EVENT_SENT_OPEN",
    "EVENT_STOP",
    "RECEIVE",
    "RECEIVING_AWAITING",
    "RECEIVING_DISCARDING",
    "RECEIVING_ENDED",
    "RECEIVING_GIVEN_UP",
    "RECEIVING_OPEN",
    "SEND",
    "SENDING_ENDED",
    "SENDING_FINISHING",
    "SENDING_OPEN",
    "SENDING_REFUSING",
    "SENDING_RESETTING",
    "SENDING_UNDECIDED",
    "SENDING_UNSENT",
    "Event",
    "Receiving",
    "Sending",
]


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


# The members once more, as names of the module: for what runs for every frame. Python 3.11 looks ``Sending.OPEN`` up
# through ``__getattr__`` of the enum's class, which takes ten times as long.
RECEIVING_OPEN: Final = Receiving.OPEN
RECEIVING_AWAITING: Final = Receiving.AWAITING
RECEIVING_GIVEN_UP: Final = Receiving.GIVEN_UP
RECEIVING_DISCARDING: Final = Receiving.DISCARDING
RECEIVING_ENDED: Final = Receiving.ENDED

SENDING_OPEN: Final = Sending.OPEN
SENDING_UNSENT: Final = Sending.UNSENT
SENDING_UNDECIDED: Final = Sending.UNDECIDED
SENDING_FINISHING: Final = Sending.FINISHING
SENDING_RESETTING: Final = Sending.RESETTING
SENDING_REFUSING: Final = Sending.REFUSING
SENDING_ENDED: Final = Sending.ENDED

EVENT_DATA: Final = Event.DATA
EVENT_FIN: Final = Event.FIN
EVENT_ACCEPT: Final = Event.ACCEPT
EVENT_REFUSE: Final = Event.REFUSE
EVENT_RESET: Final = Event.RESET
EVENT_STOP: Final = Event.STOP
EVENT_DO_ACCEPT: Final = Event.DO_ACCEPT
EVENT_DO_REFUSE: Final = Event.DO_REFUSE
EVENT_DO_FINISH: Final = Event.DO_FINISH
EVENT_DO_RESET: Final = Event.DO_RESET
EVENT_DO_STOP: Final = Event.DO_STOP
EVENT_SENT_OPEN: Final = Event.SENT_OPEN
EVENT_SENT_END: Final = Event.SENT_END

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
