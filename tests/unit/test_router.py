"""Routes, grants and the order of choice among workers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.addresses import parse_host
from konnektor.errors import ConfigurationError, NoRouteError
from konnektor.router import (
    DEFAULT,
    Route,
    RouteChoice,
    Router,
    as_routes,
    granted_routes,
    parse_grant_route,
    parse_route,
)


def routes(text: str) -> list[Route]:
    return [parse_route(part) for part in text.split()]


def router(**workers: str) -> Router:
    result = Router()
    for name, text in workers.items():
        result.set_routes(name.replace("_", "-"), routes(text))
    return result


@pytest.mark.parametrize(
    "text", ["default", "host=node-1", "host=*.example", "host=n?de-*", "cidr=10.1.0.0/16", "cidr=fd00::/8"]
)
def test_routes_read_and_print(text: str) -> None:
    assert str(parse_route(text)) == text


def test_routes_are_normalised() -> None:
    assert parse_route("host=10.0.0.7") == parse_route("cidr=10.0.0.7") == parse_route("cidr=::ffff:10.0.0.7")
    assert parse_route("host=DB.Example.") == parse_route("host=db.example")
    assert parse_route("host=*.Example.") == parse_route("host=*.example")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown"),
        ("node-1", "unknown"),
        ("default=1", "unknown"),
        ("host=10.0.0.0/8", "unknown"),
        ("host=", "neither"),
        ("host=127.1", "neither"),
        ("host=*/x", "pattern"),
        ("host=[ab]*", "pattern"),
        ("host=*" + "a" * 253, "pattern"),
        ("cidr=db.example", "no network"),
        ("cidr=10.0.0.1/8", "host bits"),
    ],
)
def test_bad_routes(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_route(text)


def test_grant_route() -> None:
    assert parse_grant_route("node-1=cidr=10.1.0.0/16") == ("node-1", parse_route("cidr=10.1.0.0/16"))
    assert parse_grant_route("node-1=default") == ("node-1", DEFAULT)
    with pytest.raises(ConfigurationError, match="names no worker"):
        parse_grant_route("default")
    with pytest.raises(ConfigurationError, match="not usable"):
        parse_grant_route("host=*.A=b".upper())


@pytest.mark.parametrize(
    ("grant", "claim", "covered"),
    [
        ("default", "default", True),
        ("default", "host=a", False),
        ("host=*", "default", False),
        ("host=a", "host=a", True),
        ("host=a", "host=b", False),
        ("host=*.a", "host=x.a", True),
        ("host=*.a", "host=a", False),
        ("host=*.a", "host=*.a", True),
        ("host=*", "host=*.a", True),
        ("host=*.a", "host=*.b.a", True),
        ("host=*.a", "host=x?-*.a", True),
        ("host=*.b.a", "host=*.a", False),
        ("host=*.a", "host=*a", False),
        ("host=*.a", "host=*.a*", False),
        ("host=*.a", "host=*.?", False),
        ("host=?.a", "host=*.b.a", False),
        ("host=*.?.a", "host=*.b.?.a", False),  # it is, and not seen
        ("host=b.a", "host=*.a", False),
        ("host=*", "cidr=10.0.0.0/8", False),
        ("cidr=10.0.0.0/8", "cidr=10.1.0.0/16", True),
        ("cidr=10.0.0.0/8", "host=10.0.0.7", True),
        ("cidr=10.1.0.0/16", "cidr=10.0.0.0/8", False),
        ("cidr=10.0.0.0/8", "cidr=11.0.0.0/16", False),
        ("cidr=0.0.0.0/0", "cidr=::/0", False),
        ("cidr=0.0.0.0/0", "host=a", False),
    ],
)
def test_grants_cover(grant: str, claim: str, covered: bool) -> None:
    assert parse_route(grant).covers(parse_route(claim)) is covered


NAMES = ["".join(letters) for length in range(1, 6) for letters in product("ab.", repeat=length)]


@given(st.text("ab.*?", min_size=1, max_size=4), st.text("ab.*?", min_size=1, max_size=4))
def test_what_a_grant_covers_is_a_part_of_it(grant: str, claim: str) -> None:
    if Route(grant).covers(Route(claim)):
        assert all(Route(grant).matches(name) for name in NAMES if Route(claim).matches(name))


@pytest.mark.parametrize(
    ("route", "host", "matches"),
    [
        ("default", "db.example", True),
        ("default", "10.0.0.7", True),
        ("host=db.example", "db.example", True),
        ("host=db.example", "a.db.example", False),
        ("host=db.example", "10.0.0.7", False),
        ("host=*.example", "db.example", True),
        ("host=*.example", "example", False),
        ("host=*", "10.0.0.7", False),
        ("cidr=10.0.0.0/8", "10.0.0.7", True),
        ("cidr=10.0.0.0/8", "11.0.0.7", False),
        ("cidr=10.0.0.0/8", "::1", False),
        ("cidr=10.0.0.0/8", "db.example", False),
    ],
)
def test_a_route_matches_as_the_router_does(route: str, host: str, matches: bool) -> None:
    assert parse_route(route).matches(parse_host(host)) is matches
    if matches:
        assert router(w=route).choose(host).worker == "w"
    else:
        with pytest.raises(NoRouteError):
            router(w=route).choose(host)


def test_claims_without_a_grant_are_ignored() -> None:
    claims = routes("host=node-1 cidr=10.1.0.0/16 default cidr=10.1.0.0/16 host=node-2 default")
    grants = [parse_grant_route("node-1=cidr=10.0.0.0/8"), parse_grant_route("node-2=default")]
    counted, ignored = granted_routes("node-1", claims, grants)
    assert list(counted) == routes("host=node-1 cidr=10.1.0.0/16")
    assert list(ignored) == routes("default host=node-2")


def test_the_certificates_name_counts_by_itself() -> None:
    assert granted_routes("node-1", [], []) == ((Route("node-1"),), ())
    assert granted_routes("42", [], []) == ((), ())


def test_most_specific_route_wins() -> None:
    r = router(
        exact="host=db.example",
        narrow="cidr=10.1.0.0/16 host=*b.example",
        wide="cidr=10.0.0.0/8 host=*.example host=10.1.2.3",
        six="cidr=fd00::/8",
        rest="default",
    )
    for host, worker in {
        "db.example": "exact",
        "DB.example.": "exact",
        "web.example": "narrow",
        "www.example": "wide",
        "a.b.c.example": "wide",
        "10.1.2.3": "wide",
        "10.1.2.4": "narrow",
        "::ffff:10.1.2.4": "narrow",
        "10.2.0.1": "wide",
        "fd00::1": "six",
        "fe00::1": "rest",
        "11.0.0.1": "rest",
        "example": "rest",
    }.items():
        assert r.choose(host) == RouteChoice(worker, host)


def test_no_route() -> None:
    r = router(a="cidr=10.0.0.0/8 host=*.example")
    for host in ("11.0.0.1", "other", "::1"):
        with pytest.raises(NoRouteError, match="no worker serves"):
            r.choose(host)
    with pytest.raises(ConfigurationError, match="neither"):
        r.choose("127.1")


def test_header_names_the_worker() -> None:
    r = router(a="default", b="")
    assert r.candidates("10.0.0.7", "b") == [RouteChoice("b", "10.0.0.7")]
    with pytest.raises(NoRouteError, match="worker 'c' is not connected"):
        r.choose("10.0.0.7", "c")


def test_suffix_names_the_worker_before_the_header() -> None:
    r = router(node_1="", other="default")
    r.set_routes("node-1.example", ())
    r.set_routes("7.node-1", ())
    for host, choice in {
        "10.0.0.7.node-1.konnektor.internal": ("node-1", "10.0.0.7"),  # not host 10.0.0 of worker 7.node-1
        "db.node-1.konnektor.internal": ("node-1", "db"),
        "db.7.node-1.konnektor.internal": ("7.node-1", "db"),
        "DB.Example.NODE-1.Konnektor.Internal.": ("node-1", "db.example"),
        "10.0.0.7.node-1.example.konnektor.internal": ("node-1.example", "10.0.0.7"),
        "a.b.node-1.example.konnektor.internal": ("node-1.example", "a.b"),
    }.items():
        assert r.candidates(host, "other") == [choice]


def test_what_names_one_worker_is_no_name_at_another_while_that_one_is_away() -> None:
    """``a.b`` at ``c`` is another place than ``a`` at ``b.c``."""
    r = router(c="")
    assert r.choose("a.b.c.konnektor.internal") == RouteChoice("c", "a.b")  # nobody has heard of b.c
    r.set_routes("b.c", ())
    for _ in range(2):
        assert r.choose("a.b.c.konnektor.internal") == RouteChoice("b.c", "a")
        r.remove("b.c")
        with pytest.raises(NoRouteError, match=r"names worker b\.c, which is not connected"):
            r.choose("a.b.c.konnektor.internal")
        r.set_routes("b.c", ())
    r.remove("b.c")
    assert r.choose("b.c.konnektor.internal") == RouteChoice("c", "b")
    assert r.choose("10.0.0.7.c.konnektor.internal") == RouteChoice("c", "10.0.0.7")
    r.know("7.c")  # leaves no usable host
    assert r.choose("10.0.0.7.c.konnektor.internal") == RouteChoice("c", "10.0.0.7")
    r.know("y.c")
    r.know("c")
    with pytest.raises(NoRouteError, match=r"names worker y\.c"):
        r.choose("x.y.c.konnektor.internal")


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("node-1.konnektor.internal", "no host: write HOST.node-1.konnektor.internal"),
        ("db.node-2.konnektor.internal", "no connected worker"),
        ("127.1.node-1.konnektor.internal", "no connected worker"),
        ("x.konnektor.internal", "no connected worker"),
    ],
)
def test_bad_suffix(host: str, says: str) -> None:
    with pytest.raises(NoRouteError, match=says):
        router(node_1="default").choose(host)


def test_equals_take_turns() -> None:
    r = router(a="default cidr=10.0.0.0/8", b="default cidr=10.0.0.0/8")
    # Two destinations asked for alternately: each has its own turns.
    seen = [(r.choose("10.0.0.7").worker, r.choose("other").worker) for _ in range(4)]
    assert seen == [("a", "a"), ("b", "b")] * 2


def test_least_loaded_comes_first_and_the_others_follow() -> None:
    load = {"a": 3, "b": 1, "c": 1, "d": 0}
    r = Router(load.__getitem__)
    for name in "abc":
        r.set_routes(name, [DEFAULT, Route("db")])
    r.set_routes("d", [DEFAULT])
    assert [c.worker for c in r.candidates("db")] == ["b", "c", "a"]
    load["b"] = 9
    assert [c.worker for c in r.candidates("db")] == ["c", "a", "b"]
    assert [c.worker for c in r.candidates("other")] == ["d", "c", "a", "b"]


def test_routes_follow_set_and_remove() -> None:
    r = router(a="host=*.x cidr=10.0.0.0/8 host=db", b="host=*.x")
    assert r.routes("a") == tuple(routes("host=*.x cidr=10.0.0.0/8 host=db"))
    r.set_routes("a", routes("cidr=10.0.0.0/9 cidr=10.128.0.0/9"))
    assert r.choose("y.x").worker == "b"
    assert r.choose("10.200.0.1").worker == "a"
    r.remove("a")
    r.remove("b")
    r.remove("never-there")
    assert r.routes("a") == ()
    for host in ("y.x", "10.0.0.1", "db"):
        with pytest.raises(NoRouteError):
            r.choose(host)


def test_a_hostile_glob_matches_in_no_time() -> None:
    r = router(a="host=" + "*a" * 100 + "b")
    with pytest.raises(NoRouteError):
        r.choose(".".join(["a" * 60] * 4))


def test_routes_may_be_routes_and_text() -> None:
    assert as_routes([DEFAULT, "host=db"]) == (DEFAULT, Route("db"))
    unusable: list[Any] = [7]
    with pytest.raises(ConfigurationError, match="route 7 is neither text nor a Route: write"):
        as_routes(unusable)
    with pytest.raises(ConfigurationError, match="routes takes a list, not 'default': write"):
        as_routes("default")


@pytest.mark.parametrize("grant", ["node-1=default", ("node-1", "default"), ("node-1", DEFAULT)])
def test_grants_as_text_and_as_pairs(grant: object) -> None:
    assert parse_grant_route(grant) == ("node-1", DEFAULT)


@pytest.mark.parametrize("grant", [DEFAULT, ("node-1",), (1, "default"), 7])
def test_what_is_no_grant(grant: object) -> None:
    with pytest.raises(ConfigurationError, match=r"is neither text nor \(NAME, ROUTE\): write"):
        parse_grant_route(grant)
