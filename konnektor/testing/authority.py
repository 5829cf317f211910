"""A CA and the certificates of endpoints, made at run time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from konnektor.pki import init_ca, issue
from konnektor.tls import Role, TLSFiles

__all__ = ["Certificates", "certificates"]


@dataclass(frozen=True, slots=True)
class Certificates:
    """What ``certificates`` made.

    Attributes:
        control_plane: of the control plane, for ``ControlPlane(tls=...)``.
        workers: of each worker by its name, for ``Worker(tls=...)``.
        ca: the file of the CA that issued them.
    """

    control_plane: TLSFiles
    workers: Mapping[str, TLSFiles]
    ca: Path


def certificates(directory: str | os.PathLike[str], *workers: str, control_plane: str = "cp") -> Certificates:
    """A CA of its own, and certificates of a control plane and of workers that trust each other.

    The control plane's is for ``localhost``, ``127.0.0.1``, ``::1`` and its name. It takes a few milliseconds for
    each, so one set can serve all tests of a run. Whom the endpoints are to refuse has a set of another directory.

    Args:
        directory: where the files go; made if it is not there, and in use for nothing else.
        workers: their names.
        control_plane: the control plane's name.

    Raises:
        ConfigurationError: a name is not one or is there twice, or the directory has such files or cannot be written.
    """
    ca = init_ca(directory).cert

    def files(role: Role, name: str) -> TLSFiles:
        issued = issue(directory, role, name)
        return TLSFiles(ca, issued.cert, issued.key)

    return Certificates(
        files(Role.CONTROL_PLANE, control_plane), {name: files(Role.WORKER, name) for name in workers}, ca
    )
