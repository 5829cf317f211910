"""Certificates that are renewed under a running endpoint: read again when the files change, swapped when they are good."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from konnektor.errors import CertificateError, ConfigurationError
from konnektor.handshake import date, printable
from konnektor.tls import read_certificates

__all__ = ["ReloadingContext"]

DAY: Final = 86_400.0
"""Seconds between two looks at the files, and two warnings."""
RETRY: Final = 2.0
"""Seconds until files that could not be used are tried again, though they are the same."""
SOON: Final = timedelta(days=30)
"""How long before a certificate expires its owner is warned; if its whole life is shorter than 90 days, a third of it."""

logger = logging.getLogger("konnektor.tls")


class ReloadingContext:
    """A TLS context that follows its files, and warns before its certificate expires.

    Args:
        build: makes the context from the files; raises a CertificateError if they cannot be used.
        files: certificate, key and CA, in this order.
        owner: whose certificate it is, for the log.

    Raises:
        CertificateError: the files cannot be used to begin with.
        ConfigurationError: as ``build``.
    """

    def __init__(self, build: Callable[[], ssl.SSLContext], *files: str | os.PathLike[str], owner: str) -> None:
        self._build = build
        self._paths = [Path(path) for path in files]  # made once: they are looked at for each connection
        self._owner = owner
        self._timer: asyncio.TimerHandle | None = None
        self._stamp = self._look()
        self._context, self._ends, self._warned_from = self._load()
        self._warn()
        self._failed: tuple[tuple[int, ...], ...] | None = None
        """The stamp of the files that could not be used when they were last tried."""
        self._retry_at = -math.inf
        self._told: set[str] = set()

    def _look(self) -> tuple[tuple[int, ...], ...] | None:
        try:
            stats = [path.stat() for path in self._paths]
        except (OSError, ValueError):  # ValueError: a path with a NUL, of which reading says more
            return None
        # ctime is what chmod changes, and a file that is given an older mtime.
        return tuple([(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino) for stat in stats])

    def get(self) -> ssl.SSLContext:
        """The context for the next connection. Files that went bad are logged once; the last good ones go on serving.

        They are tried again meanwhile: it may have been the clock, or that descriptors had run out.
        """
        stamp = self._look()
        if stamp != self._stamp and (stamp != self._failed or time.monotonic() >= self._retry_at):
            self._renew(stamp)
        return self._context

    def _renew(self, stamp: tuple[tuple[int, ...], ...] | None) -> None:
        try:
            self._context, self._ends, self._warned_from = self._load()
        except (CertificateError, ConfigurationError) as error:
            if stamp != self._failed:
                self._told.clear()
            reason = str(error).partition(" (now ")[0]  # the time of day makes no new reason
            if reason not in self._told:
                self._told.add(reason)
                logger.error(  # noqa: TRY400 - an event, not a defect
                    "keeping the certificate that was loaded before: %s", error
                )
            self._failed, self._retry_at = stamp, time.monotonic() + RETRY
        else:
            self._stamp = stamp
            self._told.clear()
            self._retry_at = -math.inf
            logger.info("loaded the certificate of %s again", self._owner)
            self._warn()

    def _load(self) -> tuple[ssl.SSLContext, datetime, datetime]:
        """The context, when the first certificate of its chain expires, and from when on that is worth a warning."""
        context = self._build()
        chain = read_certificates(self._paths[0], "certificate file")
        first = min(chain, key=lambda certificate: certificate.not_valid_after_utc)
        ends = first.not_valid_after_utc
        return context, ends, ends - min(SOON, (ends - first.not_valid_before_utc) / 3)

    # Before it expires

    def _warn(self) -> None:
        now = datetime.now(UTC)
        if now >= self._warned_from:
            expires = "expires" if now < self._ends else "expired"
            path = printable(os.fspath(self._paths[0]))
            logger.warning("certificate file %s %s on %s; issue a new one", path, expires, date(self._ends))

    def watch(self) -> None:
        """Looks at the files, and when the certificate expires, once a day as well as for connections; until ``stop``."""
        ahead = (self._warned_from - datetime.now(UTC)).total_seconds()
        # A certificate of a few hours would be over before the next look.
        delay = max(1.0, ahead) if 0 < ahead < DAY else DAY
        self._timer = asyncio.get_running_loop().call_later(delay, self._look_after)

    def _look_after(self) -> None:
        before = self._context
        if self.get() is before:  # else it was loaded again, and warned of then
            self._warn()
        self.watch()

    def stop(self) -> None:
        """Looks at the files for connections only."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
