"""Limits are validated at the time they are made, each with a sentence that names it."""

import dataclasses

import pytest

from konnektor.errors import ConfigurationError
from konnektor.limits import GIB, KIB, MIB, Limits, format_size, parse_size

EDGES = {
    "max_frame": (16_376, 65_535),
    "initial_window": (16 * KIB, None),
    "initial_streams": (8, None),
    "idle_timeout": (30, 86_400),
    "receive_pool": (None, None),
    "max_window": (16 * KIB, None),
    "send_queue": (KIB, None),
    "ack_bytes": (1, None),
    "ack_delay": (0.001, None),
    "hello_timeout": (0.1, None),
    "open_deadline": (0.001, 300),
    "flight_floor": (64 * KIB, None),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    low, high = EDGES[name]
    if low is not None:
        assert getattr(Limits(**{name: low}), name) == low
        with pytest.raises(ConfigurationError, match=name):
            Limits(**{name: low * 0.99 if isinstance(low, float) else low - 1})
    if high is not None:
        assert getattr(Limits(**{name: high}), name) == high
        with pytest.raises(ConfigurationError, match=f"{name} must be between"):
            Limits(**{name: high + 1})


@pytest.mark.parametrize("value", [True, "64", None, 1.5])
def test_types(value):
    with pytest.raises(ConfigurationError, match="must be a number"):
        Limits(initial_streams=value)


def test_half_of_the_pool_is_for_the_reservations():
    Limits(initial_streams=1024, initial_window=32 * KIB, receive_pool=64 * MIB)
    with pytest.raises(ConfigurationError, match="at least 66688KiB"):
        Limits(initial_streams=1042, initial_window=32 * KIB, receive_pool=64 * MIB)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64k", 64 * KIB),
        ("64KiB", 64 * KIB),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("2MB", 2 * MIB),
        ("0", 0),
        ("7b", 7),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.k", "1e9", "12 34", "٣"])
def test_not_a_size(text):
    with pytest.raises(ConfigurationError):
        parse_size(text)


def test_format_size():
    assert [format_size(n) for n in (0, 1, 1536, 2 * KIB, 3 * MIB, 4 * GIB)] == [
        "0",
        "1",
        "1536",
        "2KiB",
        "3MiB",
        "4GiB",
    ]


def test_what_a_session_may_be_granted():
    limits = Limits(initial_streams=8, receive_pool=2 * MIB, replay_buffer=MIB)
    assert limits.session_memory == 3 * MIB
    assert dataclasses.replace(limits, resume_grace=0).session_memory == 2 * MIB
