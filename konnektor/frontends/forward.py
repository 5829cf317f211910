"""Fixed forwards: whoever connects to a local address gets a stream to one destination (``ssh -L``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from konnektor.errors import Code, KonnektorError, PeerError, StreamError
from konnektor.session import Session
from konnektor.socket_transport import SocketTransport
from konnektor.splice import Splice
from konnektor.stream_types import StreamType

__all__ = ["ForwardSplice"]


class ForwardSplice(Splice):
    """One accepted connection: opens its stream and relays at once, ahead of the answer.

    A refusal reaches the client as a reset, which is all that TCP can say.

    Args:
        choose: the session to use now; raises a KonnektorError if there is none.
        request: what to open.
        on_refused: told why a stream could not be opened.
    """

    __slots__ = ("_choose", "_on_refused", "_request")

    def __init__(
        self, choose: Callable[[], Session], request: StreamType, on_refused: Callable[[KonnektorError], None]
    ) -> None:
        super().__init__(code=Code.CANCELLED)
        self._choose = choose
        self._request = request
        self._on_refused = on_refused

    def connected(self, transport: asyncio.Transport | SocketTransport) -> None:
        assert isinstance(transport, SocketTransport)
        self.transport = transport
        try:
            self.attach(self._choose().open_sink(self._request, self))
        except KonnektorError as error:
            self._on_refused(error)
            self.break_off()

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        if isinstance(error, StreamError) and error.refused:
            self._on_refused(error)
        super().failed(error, receiving=receiving, sending=sending)
