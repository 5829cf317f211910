"""From what py-spy saw to groups, tables and pictures; and once what it sees."""

import os
import shutil
import sys
import xml.etree.ElementTree as ET

import pytest

from bench import profiles
from bench.__main__ import Wrong
from bench.columns.tools import Failed
from bench.peers import Konnektor
from bench.peers.peer import SIDES
from bench.processes import raise_descriptor_limit, user_and_system
from bench.profiles import CASES, Profile, profile, py_spy, recording, table
from bench.report.flames import COLOURS, draw
from bench.stacks import Frame, Group, grouped, lineage, parse, tidy, weighed
from bench.targets import targets
from konnektor import mux
from tests.tools import lacking, needs

LOOP = "<module> (konnektor/__main__.py);Runner.run (asyncio/runners.py);uv_run (core.c);"
FLUSH = LOOP + "Handle__run (loop.c);Driver._flush (konnektor/driver.py);"
RAW = f"""\
{LOOP}uv__io_poll (linux.c);epoll_pwait (libc.so.6) 10
{LOOP}SocketTransport._readable (konnektor/socket_transport.py);sock_recv (socketmodule.c);__libc_recv (libc.so.6) 20
{LOOP}SocketTransport._readable (konnektor/socket_transport.py);bytearray_init (bytearrayobject.c) 5
{FLUSH}Mux.chunks_to_send (konnektor/mux.py:364);set_lookup (setobject.c);0x7f12ab (libc.so.6) 25
{FLUSH}write (loop.c);SSLObject.write (ssl.py);_ssl__SSLSocket_write (_ssl.c.h);0x7f (libcrypto.so.3);0x80 (libcrypto.so.3) 30
{LOOP}Targets.serve (konnektor/targets.py);Py_DECREF (object.h) 8
_start (crt1.o) 2
"""


def test_raw_output_is_parsed():
    stacks = parse(RAW)
    assert stacks.total() == 100 and len(stacks) == 7
    assert stacks[Frame("_start", "crt1.o"),] == 2
    (mux,) = (stack for stack in stacks if Frame("Mux.chunks_to_send", "konnektor/mux.py") in stack)  # without its line
    assert mux[0] == ("<module>", "konnektor/__main__.py") and mux[-1] == (
        "libc.so.6",
        "libc.so.6",
    )  # an address is its library


def test_frames_of_any_shape():
    (stack,) = parse("a (b) (<frozen runpy>:88);operator()(int) (x.cc);no file;0x12 ([vdso]) 1")
    assert [tuple(frame) for frame in stack] == [
        ("a (b)", "<frozen runpy>"), ("operator()(int)", "x.cc"), ("no file", ""), ("[vdso]", "[vdso]")
    ]  # fmt: skip
    assert [str(frame) for frame in stack] == [
        "a (b) (<frozen runpy>)",
        "operator()(int) (x.cc)",
        "no file ()",
        "[vdso]",
    ]


@pytest.mark.parametrize("text", ["nothing", "a (b) x", " 3"])
def test_what_is_no_raw_output_is_told(text):
    with pytest.raises(ValueError, match="not a line of py-spy's raw format"):
        parse(text)


def test_groups():
    shares = {group: share for group, share in grouped(parse(RAW)).items() if share}
    assert shares == {
        Group.RECEIVING: 0.2, Group.POLLING: 0.1, Group.WRITING: 0.3, Group.MULTIPLEXER: 0.25, Group.SPLICE: 0.05,
        Group.KONNEKTOR: 0.08, Group.OTHER: 0.02,
    }  # fmt: skip
    assert set(grouped({}).values()) == {0}


@pytest.mark.parametrize(
    ("frames", "group"),
    [
        ("f (loop.c);write (libc.so.6)", Group.SENDING),
        ("f (loop.c);__write (libc.so.6)", Group.SENDING),
        ("f (loop.c);recv (libc-2.31.so)", Group.RECEIVING),
        ("f (loop.c);accept4 (libc.so.6)", Group.SYSTEM),
        ("f (loop.c);memmove (libc.so.6)", Group.LOOP),
        ("write (loop.c);write (mine.py)", Group.LOOP),  # only the library's write is a system call
        ("SSLObject.read (ssl.py);read (_ssl.c);malloc (libc.so.6)", Group.READING),
        ("AlertingSSLObject.do_handshake (konnektor/handshake.py);0x1 (libssl.so.3)", Group.TLS),
        ("Session.open (konnektor/session.py);dict_get (dictobject.c)", Group.KONNEKTOR),
        ("SSLObject.read (ssl.py);Mux.receive (konnektor/mux.py)", Group.MULTIPLEXER),
        ("splice (konnektor/splice.py);len (x.py)", Group.SPLICE),
        ("f (x.py);g (y.c)", Group.OTHER),
    ],
)
def test_a_stack_is_where_its_innermost_known_function_is(frames, group):
    (stack,) = parse(f"{frames} 1")
    assert list(lineage(stack))[-1] is group


def test_system_calls_get_the_share_that_the_kernel_says():
    shares = grouped(weighed(parse(RAW), 0.6))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[Group.RECEIVING] == pytest.approx(0.4) and shares[Group.POLLING] == pytest.approx(0.2)
    assert shares[Group.WRITING] == pytest.approx(0.3 / 0.7 * 0.4)


@pytest.mark.parametrize("kernel", [float("nan"), -1, 2])
def test_without_the_kernels_word_samples_count_as_they_are(kernel):
    stacks = parse(RAW)
    assert weighed(stacks, kernel) == stacks
    assert weighed({}, 0.5) == {}


def test_a_picture_begins_with_the_loop_and_has_each_function_once():
    (stack,) = parse(
        "main (x.py);Runner.run (asyncio/runners.py);f (loop.c:1);f (loop.c:2);Py_INCREF (object.h);w (_ssl.c.h) 1"
    )
    assert tidy(stack) == (("f", "loop.c"), ("w", "_ssl.c.h"))


def test_a_picture():
    tree = ET.fromstring(draw(parse(RAW), "one <end>"))
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    titles = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert "one <end>" in texts and "Driver._flush" in texts and "TLS: writing 30.0%" in texts
    assert "Driver._flush (konnektor/driver.py): 55.0%, the multiplexer" in titles
    assert set(COLOURS) == set(Group)


def test_what_is_too_narrow_is_left_out_of_a_picture():
    wide, narrow = (Frame("wide", "x.py"),), (Frame("narrow", "x.py"),)
    drawn = draw({wide: 999, narrow: 1}, "")
    assert "wide" in drawn and "narrow" not in drawn
    assert "<svg" in draw({}, "")


def test_a_table():
    control_plane = Profile(70, {(Frame("f", "loop.c"),): 3, (Frame("g", "konnektor/mux.py"),): 1})
    worker = Profile(9, {(Frame("f", "loop.c"),): 9})
    assert list(table({"control plane": control_plane, "worker": worker})) == [
        "| share of the CPU time, % | control plane | worker |",
        "|---|---|---|",
        "| the event loop | 75.0 | 100.0 |",
        "| the multiplexer | 25.0 | 0.0 |",
        "| samples | 70 | 9 |",
    ]


def test_without_py_spy_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "py-spy" else f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "argv", ["profiles"])
    with pytest.raises(SystemExit) as caught:
        profiles.main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    assert err == "py-spy is missing: the extra `bench` has it, and `make profile` installs that\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--cases", "up,nonsense"], "'nonsense' is no case: choose from up, "),
        (["--seconds", "0"], "--seconds must be above 0"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(args, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profiles", *args])
    with pytest.raises(SystemExit) as caught:
        profiles.main()
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(sentence)


@pytest.fixture
def spy():
    """Where it is there; it is in the extra `bench`."""
    try:
        return py_spy()
    except Wrong as reason:
        lacking(str(reason))


def test_a_process_that_cannot_be_looked_at_is_told(spy, tmp_path):
    with pytest.raises(Failed, match="py-spy: "), recording(2**22 + 1, tmp_path / "raw"):
        pytest.fail("there is no such process")


@pytest.mark.skipif(not mux.__file__.endswith(".py"), reason="compiled code is not told apart by its files")
def test_a_real_profile(spy, tmp_path):
    for tool in ("iperf3", "wrk", "nginx"):
        needs(tool)
    with targets(tmp_path, raise_descriptor_limit()) as ports:
        peer = Konnektor(ports, tmp_path)
        try:
            found = profile(CASES["requests"], peer, 1, tmp_path)
        except Failed as reason:
            if "ermission" not in str(reason):
                raise
            pytest.skip(f"{reason}")
        finally:
            peer.stop()
    assert list(found) == list(SIDES)
    for each in found.values():
        shares = grouped(each.stacks)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares[Group.MULTIPLEXER] > 0 and shares[Group.SENDING] > 0
        assert len(draw(each.stacks, "")) < 100_000


def test_user_and_system_time_is_ones_own():
    user, system = user_and_system(os.getpid())
    assert user > 0 and system >= 0
