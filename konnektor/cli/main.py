"""The ``konnektor`` command: groups, exit statuses, and one clear sentence for every mistake."""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import version
from typing import Any, Final

import click

from konnektor import mux
from konnektor.cli.control_plane import control_plane
from konnektor.cli.demo import demo
from konnektor.cli.hints import explain_usage
from konnektor.cli.options import forget_output
from konnektor.cli.pki import pki
from konnektor.cli.worker import worker
from konnektor.errors import (
    CertificateError,
    ConfigurationError,
    HandshakeError,
    KonnektorError,
    ListenError,
)

__all__ = ["cli", "main"]

EXIT_STATUS: Final[tuple[tuple[type[KonnektorError], int], ...]] = (
    (ConfigurationError, 2),
    (CertificateError, 3),
    (ListenError, 4),
    (HandshakeError, 5),
)

_COMPILED: Final = not mux.__file__.endswith(".py")
"""Whether what runs for every frame is machine code (hatch_build.py)."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(
    version("konnektor-tunnel"),
    prog_name="konnektor",
    message=f"%(prog)s, version %(version)s ({'compiled' if _COMPILED else 'not compiled'})",
)
def cli() -> None:
    """Many streams over one mutual-TLS connection that the worker dials.

    \b
    A tunnel in four commands:
      konnektor pki init --dir pki
      konnektor pki issue --dir pki --role control-plane --name cp
      konnektor pki issue --dir pki --role worker --name node-1
      konnektor control-plane --listen 127.0.0.1:8443 --ca pki/ca.pem --cert pki/cp.pem --key pki/cp.key \\
          --forward 127.0.0.1:8080=node-1/127.0.0.1:80
    and, where the worker is:
      konnektor worker --connect 127.0.0.1:8443 --ca pki/ca.pem --cert pki/node-1.pem --key pki/node-1.key \\
          --allow 127.0.0.1:80

    \b
    Shell completion, in ~/.bashrc, ~/.zshrc or config.fish:
      eval "$(_KONNEKTOR_COMPLETE=bash_source konnektor)"
      eval "$(_KONNEKTOR_COMPLETE=zsh_source konnektor)"
      _KONNEKTOR_COMPLETE=fish_source konnektor | source

    \b
    Exit status: 0 ok, 1 internal error, 2 usage or configuration, 3 certificate or key,
    4 cannot listen, 5 peer unreachable or handshake refused, 130 aborted.
    """  # noqa: D301 - \b is for click


cli.add_command(pki)
cli.add_command(control_plane)
cli.add_command(worker)
cli.add_command(demo)


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    _open_standard_streams()
    sys.exit(_run(args))


def _open_standard_streams() -> None:
    """Keeps a descriptor of 0 to 2 that is closed, as after ``>&-``, from becoming a socket or the event loop's own.

    What is written to standard output would go there then, and libuv takes it for a defect that it may close one.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest one that is free: this one
            os.set_inheritable(opened, True)


def _run(args: list[str] | None) -> int:
    try:
        result: Any = cli.main(args, prog_name="konnektor", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help itself
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _say(context.command_path if context is not None else "konnektor", explain_usage(error, cli))
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except KonnektorError as error:
        _say("konnektor", str(error))
        return next((status for kind, status in EXIT_STATUS if isinstance(error, kind)), 1)
    except Exception as error:  # noqa: BLE001 - the last place before the user
        if isinstance(error, OSError) and _raised_by(error) == click.echo.__module__:
            forget_output()
            _say("konnektor", f"standard output cannot be written: {error.strerror}")
            return 2
        traceback.print_exc()
        _say("konnektor", f"internal error: {type(error).__name__}")
        return 1
    return result if isinstance(result, int) else 0


def _raised_by(error: Exception) -> str:
    """The module whose code ran into it."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    name: str = frame.f_globals["__name__"]
    return name


def _say(who: str, what: str) -> None:
    """One line on standard error."""
    click.echo(f"{who}: {' '.join(what.split())}", err=True)
