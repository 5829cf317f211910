"""What the vectors do not say: what cannot be encoded, and the small helpers."""

import pytest

from konnektor.errors import FrameSizeError
from konnektor.frames import Accept, Close, Hello, Open, clean_text, is_grease, is_type_name, scan


@pytest.mark.parametrize(
    "frame",
    [Open(1, 1, "x", {1: b"h" * 8186}), Accept(1, {1: b"h" * 8189}), Hello(1, 1, b"n" * 32, {9: b"r" * 4053})],
)
def test_too_large_to_encode(frame):
    with pytest.raises(FrameSizeError):
        frame.encode()


@pytest.mark.parametrize(("text", "kept"), [("é" * 200, "é" * 100), ("a" + "é" * 200, "a" + "é" * 99), ("\ud800", "?")])
def test_text_is_cut_between_characters(text, kept):
    [(frame, _)] = scan(Close(1, text).encode())
    assert frame.text == kept


def test_grease():
    assert is_grease(0x0A0A) and is_grease(0xFA1A)
    assert not is_grease(0x0A0B) and not is_grease(1)


def test_names():
    assert is_type_name("exec@acme.example")
    assert not any(map(is_type_name, ("", "a b", "a\n", "é", "n" * 256)))


def test_clean_text():
    assert clean_text(b"a\x00\x1f\x7f\xc2\x80b") == "a????b"


def test_scan_stops_before_a_bad_header_is_whole():
    assert list(scan(b"\x7f" * 7)) == []
