"""Fixed forwards: whoever connects to a local address gets a stream to one destination (``ssh -L``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from konnektor.errors import Code, KonnektorError
from konnektor.session import Session
from konnektor.splice import Splice
from konnektor.stream_types import StreamType

__all__ = ["forward_protocol"]


def forward_protocol(
    choose: Callable[[], Session], request: StreamType, on_refused: Callable[[KonnektorError], None]
) -> asyncio.BufferedProtocol:
    """The protocol of one accepted connection: opens its stream and relays at once, ahead of the answer.

    A refusal reaches the client as a reset, which is all that TCP can say.

    Args:
        choose: the session to use now; raises a KonnektorError if there is none.
        request: what to open.
        on_refused: told why a stream could not be opened.
    """
    joint = Splice(code=Code.CANCELLED)

    def connected(_transport: asyncio.Transport) -> None:
        try:
            joint.attach(choose().open_sink(request, joint))
        except KonnektorError as error:
            on_refused(error)
            joint.break_off()

    joint.on_connected = connected
    return joint.local
