"""``konnektor worker``: the endpoint that dials."""

from __future__ import annotations

import click

from konnektor.addresses import canonical_host, parse_hostport
from konnektor.cli.options import Common, Parsed, endpoint_options, say_ready
from konnektor.policy import AllowRule, parse_allow
from konnektor.router import parse_route
from konnektor.runtime import run, serve
from konnektor.worker import Worker

__all__ = ["worker"]


def _connect(text: str) -> str:
    parse_hostport(text)
    return text


def _route(text: str) -> str:
    parse_route(text)
    return text


@click.command("worker", short_help="Dial control planes, and serve what --allow names.")
@click.option(
    "--connect",
    required=True,
    multiple=True,
    type=Parsed("address", _connect),
    metavar="HOST:PORT",
    help="A control plane to keep a session to; may be given again. Example: --connect cp.example.com:8443",
)
@click.option(
    "--allow",
    multiple=True,
    required=True,
    type=Parsed("rule", parse_allow),
    metavar="[udp:]HOST-OR-CIDR:PORTS",
    help="What streams may reach here, and nothing else; TCP unless it says udp:; may be given again. "
    "Example: --allow 10.0.0.0/8:80,443 --allow '*.svc.example:*' --allow '[::1]:8000-8100' --allow udp:10.0.0.53:53",
)
@click.option(
    "--route",
    "routes",
    multiple=True,
    type=Parsed("route", _route),
    metavar="ROUTE",
    help="A route to claim: host=GLOB, cidr=NET or default. The control plane must grant it. "
    "Example: --route cidr=10.1.0.0/16",
)
@click.option(
    "--server-name",
    type=Parsed("name", canonical_host),
    metavar="NAME",
    help="Name to demand of the control plane's certificate, if not the host. Example: --server-name cp",
)
@click.option(
    "--once",
    is_flag=True,
    help="Connect once and never again; fail with status 5. A connection that breaks is resumed all the same, within "
    "--resume-grace. Example: --once",
)
@endpoint_options()
def worker(
    common: Common,
    connect: tuple[str, ...],
    allow: tuple[AllowRule, ...],
    routes: tuple[str, ...],
    server_name: str | None,
    once: bool,
) -> int:
    """Dial control planes, and serve what they ask for as far as --allow goes.

    Prints one line when it is connected: ready worker=NAME connected=HOST:PORT
    """

    async def main() -> int:
        endpoint = Worker(
            connect,
            tls=common.tls,
            allow=allow,
            routes=routes,
            server_name=server_name,
            once=once,
            limits=common.limits,
            priorities=common.priorities,
        )

        async def life() -> None:
            await endpoint.start()
            await endpoint.wait_connected()
            say_ready(f"worker={endpoint.identity.name} connected={endpoint.connected[0]}")
            await endpoint.wait_closed()

        return await serve(endpoint, life(), common.grace)

    return run(main())
