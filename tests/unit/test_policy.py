"""Allow rules and both checks: what a rule opens, and what no broad rule opens."""

from __future__ import annotations

import copy
import pickle
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.errors import ConfigurationError, DeniedError
from konnektor.policy import AllowList, AllowRule, parse_allow, parse_grant_from, tcp, udp
from konnektor.priorities import parse_priority


def allows(rules: str, host: str, port: int, address: str | None = None) -> bool:
    """Both stages, as an endpoint runs them; ``address`` is what a name resolves to."""
    allow_list = AllowList(parse_allow(rule) for rule in rules.split())
    try:
        allow_list.check_name(host, port)
        allow_list.check_address(host, address or host, port)
        allow_list.checker(host, port)(ip_address(address or host))
    except DeniedError:
        return False
    return True


@pytest.mark.parametrize(
    "text",
    [
        "udp:10.0.0.53:53",
        "udp:[::1]:*",
        "udp:*.example:1-9",
        "udp:53",
        "db.example:5432",
        "*.svc.example:*",
        "10.0.0.7:80,443",
        "10.0.0.0/8:8000-8100,22",
        "[::1]:80",
        "[fd00::/8]:*",
    ],
)
def test_rules_read_and_print(text: str) -> None:
    assert str(parse_allow(text)) == text


def test_rules_are_normalised() -> None:
    assert parse_allow("DB.Example.:1-65535") == parse_allow("db.example:*")
    assert parse_allow("[::ffff:127.0.0.1]:80") == parse_allow("127.0.0.1:80")
    assert parse_allow("db:80-80") == parse_allow("db:80")


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (tcp("127.0.0.1", 10250), "127.0.0.1:10250"),
        (tcp("10.0.0.0/8", "1-65535"), "10.0.0.0/8:*"),
        (tcp("::1", "80,443"), "[::1]:80,443"),
        (tcp("[fd00::/8]", "*"), "[fd00::/8]:*"),
        (tcp("*.a", 1), "*.a:1"),
        (tcp("*.a", 1), "tcp:*.a:1"),
        (udp("10.0.0.53", 53), "udp:10.0.0.53:53"),
        (udp("[::1]", "*"), "udp:[::1]:*"),
        (tcp("udp", 53), "udp:53"),
    ],
)
def test_rules_from_python(rule: AllowRule, text: str) -> None:
    assert rule == parse_allow(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("db.example", "HOST:PORTS"),
        ("::1:80", "HOST:PORTS"),
        ("udp:::1:80", "HOST:PORTS"),
        ("sctp:db:80", "HOST:PORTS"),
        ("udp:db:", "write ports as"),
        ("udp:*:53", "0.0.0.0/0"),
        ("*:80", "0.0.0.0/0"),
        ("*.10.0.0.1:80", "CIDR"),
        ("*.:80", "neither"),
        ("a*.example:80", "neither"),
        ("10.0.0.1/8:80", "host bits"),
        ("127.1:80", "neither"),
        ("db:", "write ports as"),
        ("db:80,", "write ports as"),
        ("db:0", "write ports as"),
        ("db:-80", "write ports as"),
        ("db:80-", "write ports as"),
        ("db:80-70", "write 70-80"),
        ("db:http", "write ports as"),
    ],
)
def test_bad_rules(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_allow(text)


def test_grant_from() -> None:
    assert parse_grant_from("node-1=10.0.0.1:6443") == ("node-1", tcp("10.0.0.1", 6443))
    assert parse_grant_from("node-1=udp:10.0.0.1:53") == ("node-1", udp("10.0.0.1", 53))
    with pytest.raises(ConfigurationError, match="names no worker"):
        parse_grant_from("10.0.0.1:6443")
    with pytest.raises(ConfigurationError, match="not usable"):
        parse_grant_from("=10.0.0.1:6443")


def test_nothing_is_allowed_by_default() -> None:
    assert not allows("", "10.0.0.7", 80)
    assert not allows("", "db.example", 80, "10.0.0.7")


@pytest.mark.parametrize(
    ("rules", "host", "address", "allowed"),
    [
        ("db.example:80", "db.example", "10.0.0.7", True),
        ("db.example:80", "DB.EXAMPLE.", "10.0.0.7", True),
        ("db.example:80", "other.example", "10.0.0.7", False),
        ("db.example:80", "x.db.example", "10.0.0.7", False),
        ("db.example:81", "db.example", "10.0.0.7", False),
        ("*.example:80", "db.example", "10.0.0.7", True),
        ("*.example:80", "a.b.example", "10.0.0.7", True),
        ("*.example:80", "example", "10.0.0.7", False),
        ("*.example:80", "badexample", "10.0.0.7", False),
        ("10.0.0.0/8:80", "db.example", "10.0.0.7", True),
        ("10.0.0.0/8:80", "db.example", "11.0.0.7", False),
        ("10.0.0.0/8:81 db.example:81", "db.example", "10.0.0.7", False),
        # A name rule does not open the addresses for direct requests, nor special addresses.
        ("db.example:80", "10.0.0.7", None, False),
        ("db.example:80", "db.example", "127.0.0.1", False),
        ("db.example:80", "db.example", "::ffff:169.254.169.254", False),
        ("localhost:80", "localhost", "127.0.0.1", False),
        ("localhost:80 127.0.0.1:80", "localhost", "127.0.0.1", True),
        ("localhost:80 127.0.0.1:81", "localhost", "127.0.0.1", False),
    ],
)
def test_names(rules: str, host: str, address: str | None, allowed: bool) -> None:
    assert allows(rules, host, 80, address) is allowed


SPECIAL = [
    ("0.0.0.0", "0.0.0.0/8"),
    ("127.0.0.1", "127.0.0.0/8"),
    ("127.255.255.255", "127.0.0.0/8"),
    ("169.254.169.254", "169.254.0.0/16"),
    ("100.100.100.200", "100.100.100.200/32"),
    ("168.63.129.16", "168.63.129.16"),
    ("224.0.0.1", "224.0.0.0/4"),
    ("239.255.255.255", "224.0.0.0/4"),
    ("255.255.255.255", "255.255.255.255"),
    ("::", "[::/128]"),
    ("::1", "[::1]"),
    ("::7f00:1", "[::/96]"),
    ("fe80::1", "[fe80::/10]"),
    ("ff02::1", "[ff00::/8]"),
    ("fd00:ec2::254", "[fd00:ec2::254]"),
    ("fd20:ce::254", "[fd20:ce::254]"),
    ("::ffff:127.0.0.1", "127.0.0.0/8"),
    ("::ffff:127.0.0.1", "[::ffff:127.0.0.0/104]"),
    ("64:ff9b::127.0.0.1", "[64:ff9b::127.0.0.0/104]"),
    ("64:ff9b::a9fe:a9fe", "[64:ff9b::169.254.169.254]"),
    ("2002:7f00:1::1", "[2002:7f00::/24]"),
    ("::ffff:0:127.0.0.1", "[::ffff:0:127.0.0.0/104]"),
    ("::ffff:0:169.254.169.254", "[::ffff:0:a9fe:a9fe]"),
    ("64:ff9b:1::127.0.0.1", "[64:ff9b:1::/48]"),
    ("64:ff9b:1:a9fe:a9:fe00::", "[64:ff9b:1:a9fe::/64]"),
    ("2001:0:7f00:1::", "[2001::/32]"),
    ("2001:0:c000:201::80ff:fffe", "[2001:0:c000:201::/64]"),
    ("fec0::1", "[fec0::/10]"),
]


@pytest.mark.parametrize(("address", "inside"), SPECIAL)
def test_special_addresses_need_a_rule_inside_their_range(address: str, inside: str) -> None:
    broad = "0.0.0.0/0:* 128.0.0.0/1:* 0.0.0.0/1:* [::/0]:* [::/8]:* [fd00::/8]:* [2002::/16]:* [64:ff9b::/96]:*"
    broad += " *.example:*"
    assert not allows(broad, address, 80)
    assert not allows(broad, "rebound.example", 80, address)
    assert allows(f"{broad} {inside}:80", address, 80)
    assert allows(f"{broad} {inside}:80", "rebound.example", 80, address)
    assert not allows(f"{broad} {inside}:81", address, 80)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.7",
        "8.8.8.8",
        "fd00::1",
        "2001:db8::1",
        "::ffff:10.0.0.7",
        "64:ff9b::8.8.8.8",
        "::ffff:0:10.0.0.7",
        "2002:a00:7::1",
        "2001:1::1",
        "64:ff9b:2::1",
    ],
)
def test_ordinary_addresses_need_any_rule(address: str) -> None:
    assert allows("0.0.0.0/0:80 [::/0]:80", address, 80)
    assert not allows("0.0.0.0/0:80 [::/0]:80", address, 81)


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "fe80::1%eth0", "a b", "", "[::1]"])
def test_what_is_neither_name_nor_address_is_denied(host: str) -> None:
    allow_list = AllowList([parse_allow("0.0.0.0/0:*"), parse_allow("127.0.0.0/8:*"), parse_allow("[::/0]:*")])
    for check in (
        lambda: allow_list.check_name(host, 80),
        lambda: allow_list.check_address(host, ip_address("10.0.0.7"), 80),
        lambda: allow_list.checker(host, 80),
    ):
        with pytest.raises(DeniedError, match="neither"):
            check()


def test_reasons_say_what_was_seen() -> None:
    allow_list = AllowList([tcp("0.0.0.0/0", "*"), tcp("db", 80)])
    with pytest.raises(
        DeniedError, match=r"no rule inside 127\.0\.0\.0/8 allows db at 127\.0\.0\.1:80, a loopback address"
    ):
        allow_list.check_address("db", "127.0.0.1", 80)
    with pytest.raises(DeniedError, match=r"no rule allows \[fd00::1\]:80"):
        allow_list.check_name("fd00::1", 80)
    with pytest.raises(DeniedError, match=r"no rule allows db:80"):
        AllowList().check_name("db", 80)


def test_a_rule_is_for_one_protocol() -> None:
    allow_list = AllowList([tcp("10.0.0.7", 53), udp("10.0.0.8", 53), tcp("db", 53), udp("0.0.0.0/0", 5353)])
    allow_list.check_name("10.0.0.7", 53)
    allow_list.check_name("10.0.0.8", 53, "udp")
    allow_list.check_address("db", "10.0.0.9", 53)
    allow_list.check_address("db", "10.0.0.8", 53, "udp")
    with pytest.raises(DeniedError, match=r"no rule allows udp:10\.0\.0\.7:53"):
        allow_list.check_name("10.0.0.7", 53, "udp")
    with pytest.raises(DeniedError, match=r"no rule allows 10\.0\.0\.8:53"):
        allow_list.check_name("10.0.0.8", 53)
    with pytest.raises(DeniedError, match=r"no rule allows udp:db at 10\.0\.0\.9:53"):
        allow_list.checker("db", 53, "udp")(ip_address("10.0.0.9"))
    with pytest.raises(DeniedError, match=r"no rule allows udp:db:54"):
        allow_list.check_name("db", 54, "udp")
    with pytest.raises(DeniedError, match=r"no rule inside 127\.0\.0\.0/8 allows udp:127\.0\.0\.1:5353"):
        allow_list.check_name("127.0.0.1", 5353, "udp")


@given(st.ip_addresses())
def test_a_name_rule_opens_no_address_itself(address: object) -> None:
    assert not allows("db.example:* *.example:*", str(address), 80)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_a_rule_for_an_address_opens_it(address: object, port: int) -> None:
    rule = tcp(str(address), port)
    AllowList([rule]).check_name(str(address), port)
    AllowList([parse_allow(str(rule))]).check_name(str(address), port)


def test_a_list_may_be_of_rules_and_of_text() -> None:
    rules = AllowList([tcp("10.0.0.7", 80), "udp:10.0.0.53:53"]).rules
    assert rules == (tcp("10.0.0.7", 80), udp("10.0.0.53", 53))


@pytest.mark.parametrize("rules", ["10.0.0.7:80", tcp("10.0.0.7", 80), 80])
def test_what_is_no_list_of_rules(rules: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"allow takes a list, not '.*': write"):
        AllowList(rules)


def test_what_is_no_rule() -> None:
    rules: list[Any] = [tcp("10.0.0.7", 80), 80]
    with pytest.raises(ConfigurationError, match="rule 80 is neither text nor an AllowRule: write"):
        AllowList(rules)


@pytest.mark.parametrize(
    "grant", ["node-1=10.0.0.1:6443", ("node-1", "10.0.0.1:6443"), ("node-1", tcp("10.0.0.1", 6443))]
)
def test_grants_as_text_and_as_pairs(grant: object) -> None:
    assert parse_grant_from(grant) == ("node-1", tcp("10.0.0.1", 6443))


@pytest.mark.parametrize("grant", [tcp("10.0.0.1", 6443), ("node-1",), ("node-1", "h:1", 2), (1, "h:1"), 7])
def test_what_is_no_grant(grant: object) -> None:
    with pytest.raises(ConfigurationError, match=r"is neither text nor \(NAME, HOST:PORTS\): write"):
        parse_grant_from(grant)


def test_what_was_allowed_once_is_no_permission_for_anything_else() -> None:
    rules = AllowList([tcp("10.0.0.7", 80), tcp("*.example", "*")])
    for _ in range(2):
        rules.check_name("10.0.0.7", 80)
        rules.check_name("a.example", 443)
        for host, port, protocol in (("10.0.0.7", 81, "tcp"), ("10.0.0.7", 80, "udp"), ("10.0.0.8", 80, "tcp")):
            with pytest.raises(DeniedError):
                rules.check_name(host, port, protocol)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        rules.rules = ()  # type: ignore[misc]


def test_a_peer_that_asks_for_all_that_is_allowed_fills_no_memory() -> None:
    rules = AllowList([tcp("10.0.0.0/8", "*")])
    for port in range(1, 5000):
        rules.check_name("10.0.0.7", port)
        assert len(rules._allowed) <= 1024
    rules.check_name("10.0.0.7", 1)


# What a compiled class would not do (pyproject.toml lists none of these modules)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
@pytest.mark.parametrize("rule", [parse_allow("10.0.0.0/8:80,443"), parse_priority("*:10250=interactive")])
def test_a_rule_can_be_copied(rule, again):
    assert again(rule) == rule


@pytest.mark.parametrize("ports", [[80, 443], range(1, 3), 80.0, None])
def test_ports_of_another_kind_get_a_sentence(ports):
    with pytest.raises(ConfigurationError, match="write ports as"):
        tcp("10.0.0.0/8", ports)
