"""Class and weight by rule: what a rule is for, and which one decides."""

import pytest

from konnektor.errors import ConfigurationError
from konnektor.priorities import Priorities, parse_priority
from konnektor.stream_types import StreamType, Tcp, Udp


class Other(StreamType):
    name = "other@test.example"
    host: str = "db.example"
    port: int = 5432


@pytest.mark.parametrize(
    "text",
    [
        "*:10250=interactive",
        "*:22,8000-8100=default:4",
        "udp:*:53=interactive:255",
        "*.svc.example:*=bulk",
        "10.0.0.0/8:873=bulk",
        "10.0.0.7:873=bulk:2",
        "[fd00::/8]:*=default",
        "udp:[::1]:53=bulk",
    ],
)
def test_rules_read_and_print(text):
    assert str(parse_priority(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no class"),
        ("*:80", "names no class"),
        ("*:80=", "names no class"),
        ("*:80=fast", "interactive, default or bulk"),
        ("*:80=Bulk", "interactive, default or bulk"),
        ("*:80=bulk:", "write 1 to 255, as bulk:4"),
        ("*:80=bulk:0", "write 1 to 255"),
        ("*:80=bulk:256", "write 1 to 255"),
        ("*:80=bulk:+1", "write 1 to 255"),
        ("*:80=bulk:1:2", "write 1 to 255"),
        ("*=bulk", "HOST:PORTS"),
        ("=bulk", "HOST:PORTS"),
        ("db.example=bulk", "HOST:PORTS"),
        ("*:http=bulk", "write ports as"),
        ("10.0.0.1/8:80=bulk", "host bits"),
        ("a*:80=bulk", "neither"),
    ],
)
def test_bad_rules(text, says):
    with pytest.raises(ConfigurationError, match=says) as caught:
        parse_priority(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "host", "port", "fits"),
    [
        ("*:80=bulk", "db.example", 80, True),
        ("*:80=bulk", "10.0.0.7", 80, True),
        ("*:80=bulk", "::1", 80, True),
        ("*:80=bulk", "db.example", 81, False),
        ("db.example:80=bulk", "DB.example.", 80, True),
        ("db.example:80=bulk", "a.db.example", 80, False),
        ("db.example:80=bulk", "10.0.0.7", 80, False),
        ("*.example:80=bulk", "db.example", 80, True),
        ("*.example:80=bulk", "example", 80, False),
        ("*.example:80=bulk", "10.0.0.7", 80, False),
        ("10.0.0.0/8:80=bulk", "10.0.0.7", 80, True),
        ("10.0.0.0/8:80=bulk", "::ffff:10.0.0.7", 80, True),
        ("10.0.0.0/8:80=bulk", "11.0.0.7", 80, False),
        ("10.0.0.0/8:80=bulk", "::1", 80, False),
        ("10.0.0.0/8:80=bulk", "db.example", 80, False),
        ("0.0.0.0/0:80=bulk", "127.0.0.1", 80, True),  # nothing is opened by it
        ("*:80=bulk", "not a host", 80, False),
    ],
)
def test_what_a_rule_is_for(rule, host, port, fits):
    assert Priorities([rule]).of(Tcp(host, port)) == ((2, 1) if fits else None)
    assert Priorities([rule]).of(Udp(host, port)) is None
    assert Priorities([f"udp:{rule}"]).of(Udp(host, port)) == ((2, 1) if fits else None)
    assert Priorities([f"udp:{rule}"]).of(Tcp(host, port)) is None


def test_the_first_that_fits_decides():
    rules = Priorities([parse_priority("db.example:*=interactive:7"), "*:80=bulk", "db.example:80=default"])
    assert rules.of(Tcp("db.example", 80)) == (0, 7)
    assert rules.of(Tcp("web.example", 80)) == (2, 1)
    assert rules.of(Tcp("web.example", 81)) is None


def test_only_types_with_a_destination():
    assert Priorities(["*:*=bulk"]).of(Other()) is None
    assert Priorities().of(Tcp("db.example", 80)) is None


def test_what_is_no_rule():
    with pytest.raises(ConfigurationError, match="priority 22 is neither text nor a PriorityRule: write"):
        Priorities([22])
    with pytest.raises(ConfigurationError, match="priorities takes a list, not '\\*:22=bulk': write"):
        Priorities("*:22=bulk")
