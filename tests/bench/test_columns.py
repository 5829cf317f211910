"""Every column measures something, with real tools and konnektor's real endpoints, in small."""

import math

import pytest

from bench.columns import COLUMNS, idle, long_path, memory, streams, workers
from bench.columns.tools import Failed
from bench.peers import Konnektor
from bench.peers.peer import CONTROL_PLANE, SIDES, Link
from bench.processes import wait_for_http
from bench.targets import targets
from tests.tools import needs


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    for tool in ("iperf3", "wrk", "nginx"):
        needs(tool)
    directory = tmp_path_factory.mktemp("bench")
    with targets(directory, 2000) as ports:
        peer = Konnektor(ports, directory)
        yield peer
        peer.stop()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(memory, "FEW", 10)
    monkeypatch.setattr(memory, "MANY", 60)
    monkeypatch.setattr(memory, "SETTLE", 0.1)
    monkeypatch.setattr(streams, "COUNTS", (1, 10))
    monkeypatch.setattr(workers, "COUNT", 3)
    monkeypatch.setattr(workers, "SETTLE", 0.1)
    monkeypatch.setattr(long_path, "WARM", 0)
    monkeypatch.setattr(long_path, "LINK", Link(0.01, 50e6))


ONE_OF_A_KIND = ("both8", "requests32", "connections", "beside", "first-byte", "path50", "memory", "streams", "workers")


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_a_column(name, running):
    column = COLUMNS[name]
    figures = column.measure(running, 0.5)
    if name == "streams":
        assert set(figures) == {"1 open", "10 open", "last / first", "10,000 opened in"}
    else:
        assert list(figures) == [figure.name for figure in column.figures]
    assert all(math.isfinite(value) for value in figures.values())
    if name not in ("memory", "workers"):  # what is small may not grow at all
        assert all(value > 0 for figure, value in figures.items() if figure != "idle")
    assert 0 <= figures.get("idle", 0) <= 100
    assert not running.ended()


def test_these_are_all_kinds():
    assert {COLUMNS[name].family for name in ONE_OF_A_KIND} == {column.family for column in COLUMNS.values()}


def test_another_of_a_kind_is_fresh_and_gone_afterwards(running):
    with running.another(link=Link(0.002)) as fresh:
        wait_for_http(fresh.ports["http"])
        assert fresh.ports != running.ports and fresh.resident(CONTROL_PLANE) > 0 and fresh.cpu() > 0
        ends = [process for side in SIDES for process in fresh.sides[side]]
        (link,) = set(fresh.processes) - set(ends)
    assert [process.returncode for process in ends] == [
        0,
        0,
    ]  # not killed: the link they would ask for was there to the end
    assert link.returncode is not None


def test_idle_connections_are_counted_against_patience(running, monkeypatch):
    monkeypatch.setattr(idle, "BATCH", 1)
    with idle.Idle(running.ports["http"]) as few:
        few.grow(5)
        with pytest.raises(Failed, match=r"50 streams were not open after 0 s but \d+"):
            few.grow(50, patience=0)
