"""Certificates that are renewed under a running endpoint: read again when the files change, swapped when they are good."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path

from konnektor.errors import CertificateError, ConfigurationError

__all__ = ["ReloadingContext"]

logger = logging.getLogger("konnektor.tls")


class ReloadingContext:
    """A TLS context that follows its files.

    Args:
        build: makes the context from the files; raises a CertificateError if they cannot be used.
        files: certificate, key and CA.
        owner: whose certificate it is, for the log.

    Raises:
        CertificateError: the files cannot be used to begin with.
        ConfigurationError: as ``build``.
    """

    def __init__(self, build: Callable[[], ssl.SSLContext], *files: str | os.PathLike[str], owner: str) -> None:
        self._build = build
        self._paths = [Path(path) for path in files]  # made once: they are looked at for each connection
        self._owner = owner
        self._stamp = self._look()
        self._context = build()

    def _look(self) -> tuple[tuple[int, int, int], ...] | None:
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        return tuple([(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats])

    def get(self) -> ssl.SSLContext:
        """The context for the next connection. Files that went bad are logged once; the last good ones go on serving."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = self._build()
            except (CertificateError, ConfigurationError) as error:
                logger.error(  # noqa: TRY400 - an event, not a defect
                    "keeping the certificate that was loaded before: %s", error
                )
            else:
                logger.info("loaded the certificate of %s again", self._owner)
        return self._context
