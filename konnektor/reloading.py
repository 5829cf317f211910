"""Certificates that are renewed under a running endpoint: read again when the files change, swapped when they are good."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from konnektor.errors import CertificateError, ConfigurationError
from konnektor.tls import Identity, TLSFiles

__all__ = ["ReloadingContext"]

logger = logging.getLogger("konnektor.tls")


class ReloadingContext:
    """A TLS context that follows its files.

    Args:
        files: certificate, key and CA.
        build: makes the context from them.

    Raises:
        CertificateError: the files cannot be used to begin with.
        ConfigurationError: as ``build``.
    """

    def __init__(self, files: TLSFiles, build: Callable[[], ssl.SSLContext]) -> None:
        self._files = files
        self._build = build
        self._stamp = self._look()
        self.identity: Identity = files.identity()
        self._context = build()

    def _look(self) -> tuple[tuple[int, int, int], ...] | None:
        try:
            stats = [Path(path).stat() for path in (self._files.ca, self._files.cert, self._files.key)]
        except OSError:
            return None
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def get(self) -> ssl.SSLContext:
        """The context for the next connection. Files that went bad are logged once; the last good ones go on serving."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                identity = self._files.identity()
                if identity != self.identity:
                    raise CertificateError(f"the certificate now names {identity}, not {self.identity}")
                self._context = self._build()
            except (CertificateError, ConfigurationError) as error:
                logger.error(  # noqa: TRY400 - an event, not a defect
                    "keeping the certificate that was loaded before: %s", error
                )
            else:
                logger.info("loaded the certificate of %s again", identity.name)
        return self._context
