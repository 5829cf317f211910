"""``konnektor demo``: the tunnel at work between real processes."""

from __future__ import annotations

import click

from konnektor.cli.options import Parsed
from konnektor.errors import ConfigurationError
from konnektor.limits import parse_size

__all__ = ["demo"]


def _size(text: str) -> int:
    size = parse_size(text)
    if not size:
        raise ConfigurationError("nothing to move: write for example 100MiB")
    return size


@click.command("demo", short_help="Show the tunnel at work between real processes.")
@click.option(
    "--size",
    type=Parsed("size", _size),
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="Bulk bytes each way. Example: --size 100MiB",
)
def demo(size: int) -> int:
    """Show the tunnel at work: make certificates, start both ends and real servers, and use it.

    Needs curl. Everything happens on the loopback address and in a temporary directory, and is gone afterwards.
    Exit status: 0 if every step worked, 1 if one did not.
    """
    from konnektor.demo import run_demo

    return run_demo(size)
