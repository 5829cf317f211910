"""Peers that break, and what of it is in the results."""

import os
import subprocess
import time
from contextlib import nullcontext

import pytest

from bench import run
from bench.columns import COLUMNS, Column, Figure
from bench.columns.streams import Streams
from bench.columns.tools import Failed
from bench.columns.workers import Workers, connected
from bench.pace import ROUNDS, pace
from bench.peers import PEERS
from bench.peers.direct import Direct
from bench.peers.peer import Unusable
from bench.results import Results
from bench.run import cost, measure, prepare


class Once(Column):
    """Fails where it is told to."""

    name = family = "once"
    about = "nothing"
    figures = (Figure("it", "", "more"),)
    most_repeats = 2

    def cost(self, seconds):
        return 10

    def unfit(self, peer):
        return "no such figure" if peer.name == "unfit" else None

    def measure(self, peer, seconds):
        seen.append(peer)
        if peer.name == "bad":
            raise Failed("it broke", {"it": 2.0})
        return {"it": 1.0}


seen = []


def kind(name):
    return type(name, (Direct,), {"name": name})


@pytest.fixture
def results(monkeypatch):
    seen.clear()
    monkeypatch.setattr(run, "targets", lambda *_: nullcontext({}))
    monkeypatch.setattr(run, "said", lambda *_: "1")
    return Results("x", 3, 1.0)


def test_a_broken_peer_does_not_end_the_run(results, tmp_path):
    steps = []
    measure([kind("bad"), kind("good"), kind("unfit")], [Once()], results, tmp_path, steps.append)
    assert results.samples["once"]["good"]["it"] == [1.0, 1.0]  # no more repeats than the column takes
    assert results.samples["once"]["bad"]["it"] == [2.0, 2.0]  # what was measured before it broke
    assert results.failures["once"] == {"bad": "it broke", "unfit": "no such figure"}
    assert [(step.repeat, step.peer, step.failure) for step in steps] == [
        (1, "bad", "it broke"), (1, "good", None), (2, "good", None), (2, "bad", "it broke")
    ]  # fmt: skip


def test_the_pace_of_the_machine_is_taken_before_each_step(results, tmp_path, monkeypatch):
    paces = iter(range(10))
    monkeypatch.setattr(run, "pace", lambda: next(paces))
    measure([kind("bad"), kind("good"), kind("unfit")], [Once()], results, tmp_path, lambda _: None)
    assert results.paces == [0, 1, 2, 3]


def test_the_pace_is_cpu_time_and_not_time(monkeypatch):
    ticks = iter([1.0, 1.5])
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    assert pace() == pytest.approx(0.5 / ROUNDS * 1e6)


def test_what_is_not_a_number_is_left_out(results, tmp_path, monkeypatch):
    monkeypatch.setattr(Once, "measure", lambda *_: {"it": 1.0, "CPU": float("nan")})
    measure([kind("good")], [Once()], results, tmp_path, lambda step: seen.append(step.figures))
    assert seen == [{"it": 1.0}] * 2 and results.samples["once"]["good"] == {"it": [1.0, 1.0]}


def test_a_broken_peer_is_started_anew_at_once_and_others_for_the_next_repeat(results, tmp_path):
    columns = [type("Column", (Once,), {"name": name})() for name in ("one", "two")]
    measure([kind("bad"), kind("good")], columns, results, tmp_path, lambda _: None)
    bad, good = ([peer for peer in seen if peer.name == name] for name in ("bad", "good"))
    assert len(set(bad)) == len(bad) == 4
    assert good[0] is good[1] is not good[2] and good[2] is good[3]


def test_a_peer_that_does_not_start_is_a_line(results, tmp_path):
    def start(self):
        raise RuntimeError("no\nfurther")

    broken = type("broken", (Direct,), {"name": "broken", "start": start})
    measure([broken], [Once()], results, tmp_path, lambda _: None)
    assert results.failures["once"]["broken"] == "no further"


def test_who_cannot_be_prepared_is_left_out(results):
    def refuse():
        raise Unusable("it is missing")

    absent = type("absent", (Direct,), {"name": "absent", "prepare": staticmethod(refuse)})
    assert prepare([absent, Direct], results) == [Direct]
    assert results.left_out == {"absent": "it is missing"}
    assert [(peer.name, peer.reference) for peer in results.peers] == [("direct", True)]


def test_the_time_of_a_run_is_that_of_what_is_measured():
    assert cost([kind("a"), kind("b"), kind("unfit")], [Once()], 3, 1) == 2 * 2 * 10


def test_who_lacks_a_figure():
    assert Streams().unfit(PEERS["haproxy"]) and not Streams().unfit(PEERS["yamux"])
    assert Workers().unfit(PEERS["openssh"]) and not Workers().unfit(PEERS["konnektor"])
    assert COLUMNS["both8"].unfit(PEERS["sketch"]) and not COLUMNS["both8"].unfit(PEERS["konnektor"])
    assert not COLUMNS["up8"].unfit(PEERS["sketch"])


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo connected 3 in 1.5 s", 1.5),
        ("echo nonsense", "the workers said b'nonsense"),
        ("true", "the workers' process ended"),
        ("sleep 5", "3 workers were not connected within 0.2 s"),
    ],
)
def test_workers_say_when_they_are_connected(script, found):
    with subprocess.Popen(["sh", "-c", f"exec {script}"], stdout=subprocess.PIPE) as process:
        try:
            if isinstance(found, float):
                assert connected(process, 3, 5) == found
            else:
                with pytest.raises(Failed) as caught:
                    connected(process, 3, 0.2 if "not connected" in found else 5)
                assert found in str(caught.value)
        finally:
            if process.poll() is None:
                os.kill(process.pid, 9)
