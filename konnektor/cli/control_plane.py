"""``konnektor control-plane``: the endpoint that accepts."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import click

from konnektor.addresses import Forward, format_hostport, format_protocol, parse_forward, parse_hostport
from konnektor.cli.options import Common, Parsed, endpoint_options, say_ready
from konnektor.cli.places import check_places, forward_flag
from konnektor.control_plane import ControlPlane
from konnektor.errors import ConfigurationError
from konnektor.frontends.urls import Frontend, UnixFrontend, is_loopback, parse_frontend
from konnektor.limits import format_size, parse_size
from konnektor.policy import AllowRule, parse_grant_from
from konnektor.router import Route, parse_grant_route
from konnektor.runtime import run, serve

__all__ = ["control_plane"]

logger: Final = logging.getLogger("konnektor.cli")


def _listen(text: str) -> str:
    parse_hostport(text, zero=True)
    return text


@click.command("control-plane")
@click.option(
    "--listen",
    required=True,
    type=Parsed("address", _listen),
    metavar="HOST:PORT",
    help="Where workers connect. Example: --listen 0.0.0.0:8443",
)
@click.option(
    "--frontend",
    "frontends",
    multiple=True,
    type=Parsed("url", parse_frontend),
    metavar="URL",
    help="Serve HTTP CONNECT: http://127.0.0.1:8080, http+unix:///run/konnektor.sock, or "
    "https://0.0.0.0:8444?cert=F&key=F&client-ca=F. Example: --frontend http://127.0.0.1:8080",
)
@click.option(
    "--forward",
    "forwards",
    multiple=True,
    type=Parsed("forward", parse_forward),
    metavar="[udp:]LISTEN=WORKER/HOST:PORT",
    help="Forward a local address; with udp: in front, of UDP. Example: --forward 127.0.0.1:5432=node-1/10.0.0.7:5432 "
    "--forward udp:127.0.0.1:5353=node-1/10.0.0.53:53",
)
@click.option(
    "--grant-route",
    "grants",
    multiple=True,
    type=Parsed("grant", parse_grant_route),
    metavar="NAME=ROUTE",
    help="Let worker NAME claim a route: host=GLOB, cidr=NET or default. Example: --grant-route node-1=cidr=10.1.0.0/16",
)
@click.option(
    "--allow-from",
    multiple=True,
    type=Parsed("grant", parse_grant_from),
    metavar="NAME=[udp:]HOST-OR-CIDR:PORTS",
    help="Let streams of worker NAME reach an address here; TCP unless it says udp:. "
    "Example: --allow-from node-1=10.0.0.1:6443",
)
@click.option(
    "--memory",
    type=Parsed("size", parse_size),
    metavar="SIZE",
    help="Bound on what all sessions together may be granted, each its receive pool and replay buffer: workers that there "
    "is no room for are refused. Default: no bound. Example: --memory 4GiB --receive-pool 16MiB --max-streams 256",
)
@endpoint_options(serves=lambda own: own["allow_from"])
def control_plane(
    common: Common,
    listen: str,
    frontends: tuple[Frontend, ...],
    forwards: tuple[Forward, ...],
    grants: tuple[tuple[str, Route], ...],
    allow_from: tuple[tuple[str, AllowRule], ...],
    memory: int | None,
) -> int:
    """Accept workers, and let clients use what they reach.

    Prints one line when it is ready: ready tunnel=HOST:PORT http=HOST:PORT forward=...
    """
    check_places(listen, frontends, forwards)
    one = common.limits.session_memory
    if memory is not None and memory < one:
        raise ConfigurationError(
            f"--memory {format_size(memory)} is less than one session may be granted, {format_size(one)}: raise it, or "
            "lower --receive-pool, --max-streams and --replay-buffer"
        )

    async def main() -> int:
        endpoint = ControlPlane(
            listen,
            tls=common.tls,
            grant_routes=grants,
            allow_from=allow_from,
            limits=common.limits,
            memory=memory,
            priorities=common.priorities,
        )

        async def life() -> None:
            await endpoint.start()
            ready = [f"tunnel={endpoint.address}"]
            for frontend in frontends:
                bound = await endpoint.add_frontend(frontend)
                if isinstance(frontend, UnixFrontend):  # the line is split at its spaces
                    bound = bound.replace("%", "%25").replace(" ", "%20")
                ready.append(f"{frontend.kind}={bound}")
            for forward in forwards:
                bound = await endpoint.add_forward(forward)
                if not is_loopback(forward.listen_host):
                    logger.warning(
                        "%s serves whoever reaches it, in plaintext: only that address and a firewall protect it",
                        forward_flag(forward),
                    )
                where = format_protocol(forward.protocol) + bound
                ready.append(f"forward={where}->{forward.worker}/{format_hostport(forward.host, forward.port)}")
            say_ready(" ".join(ready))
            await asyncio.Event().wait()

        return await serve(endpoint, life(), common.grace)

    return run(main())
