"""``konnektor pki``: a CA and certificates for a trial, or for good."""

from __future__ import annotations

from pathlib import Path

import click

from konnektor.cli.options import forget_output
from konnektor.errors import ConfigurationError
from konnektor.pki import CA_CERT, Issued, init_ca
from konnektor.pki import issue as issue_certificate
from konnektor.tls import Role

__all__ = ["pki"]

_DIR = click.Path(file_okay=True, dir_okay=True)  # what is wrong with it is konnektor.pki's to say


@click.group()
def pki() -> None:  # \b keeps click from refilling the lines after it
    """Make a CA, and issue certificates from it.

    \b
    Example:
      konnektor pki init  --dir pki
      konnektor pki issue --dir pki --role control-plane --name cp --san cp.example.com
      konnektor pki issue --dir pki --role worker --name node-1
    """  # noqa: D301


@pki.command(short_help="Make a CA: writes ca.pem and ca.key.")
@click.option("--dir", "directory", type=_DIR, required=True, help="Where to write; made if missing.  E.g. --dir pki")
@click.option(
    "--trust-domain",
    metavar="NAME",
    default="konnektor.local",
    show_default=True,
    help="First part of every identity that the CA issues.  E.g. --trust-domain tunnel.example.com",
)
@click.option("--days", metavar="N", type=int, default=3650, show_default=True, help="Lifetime.  E.g. --days 730")
def init(directory: str, trust_domain: str, days: int) -> None:
    """Make a CA: writes ca.pem and ca.key (mode 0600), and never overwrites.

    Give ca.pem to every endpoint; keep ca.key where only you can read it.
    """
    _report(init_ca(directory, trust_domain, days))
    click.echo(f"next: konnektor pki issue --dir {directory} --role control-plane --name cp --san HOST-OR-IP", err=True)


@pki.command(short_help="Issue a certificate: writes NAME.pem and NAME.key.")
@click.option("--dir", "directory", type=_DIR, required=True, help="Where ca.pem and ca.key are.  E.g. --dir pki")
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    required=True,
    help="What the holder may act as, and nothing else.  E.g. --role worker",
)
@click.option("--name", metavar="NAME", required=True, help="Its name: a-z, 0-9, '-' and '.'.  E.g. --name node-1")
@click.option(
    "--san",
    "sans",
    metavar="HOST-OR-IP",
    multiple=True,
    help="A host name or IP address that workers dial it by; repeatable.  A control plane's certificate is always for "
    "its NAME, and without --san also for localhost, 127.0.0.1 and ::1.  E.g. --san cp.example.com --san 192.0.2.1",
)
@click.option(
    "--days",
    metavar="N",
    type=int,
    default=365,
    show_default=True,
    help="Lifetime, at most the CA's.  E.g. --days 90",
)
@click.option(
    "--out",
    type=_DIR,
    help="Where to write NAME.pem and NAME.key, if not to --dir; made if missing.  To renew, for nothing is overwritten.  "
    "E.g. --out renewed",
)
def issue(directory: str, role: str, name: str, sans: tuple[str, ...], days: int, out: str | None) -> None:
    """Issue a certificate: writes NAME.pem and NAME.key (mode 0600), and never overwrites."""
    issued = issue_certificate(directory, role, name, sans, days, out=out)
    _report(issued)
    if issued.shortened:
        click.echo(f"note: it expires on {issued.not_after:%Y-%m-%d %H:%M} UTC, with its CA", err=True)
    flags = f"--ca {Path(directory) / CA_CERT} --cert {issued.cert} --key {issued.key}"
    if role == Role.CONTROL_PLANE:
        click.echo(f"next: konnektor control-plane --listen 0.0.0.0:8443 {flags}", err=True)
    elif role == Role.WORKER:
        click.echo(f"next: konnektor worker --connect HOST:PORT {flags} --allow HOST-OR-CIDR:PORTS", err=True)


def _report(issued: Issued) -> None:
    try:
        click.echo(f"{issued.cert}\n{issued.key}")
    except OSError as error:
        forget_output()
        raise ConfigurationError(
            f"{issued.cert} and {issued.key} are made, but standard output cannot be written: {error.strerror}"
        ) from None
