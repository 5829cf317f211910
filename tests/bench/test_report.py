"""From samples to tables, goals and plots."""

import importlib.util
import io
import re
import subprocess
import sys

import pytest

from bench.columns import COLUMNS
from bench.goals import GOALS, best, verdict
from bench.report.markdown import lines
from bench.report.tables import goals, show, tables
from bench.results import Entrant, Machine, Results
from tests.tools import lacking


@pytest.fixture
def results():
    made = Results("python -m bench --repeats 3", 3, 2.0, machine=Machine("A processor", 2, 24.0, "6.1", "3.11.7"))
    made.tools = {"iperf3": "3.12"}
    made.peers = [
        Entrant("konnektor", "0.1.0", "defaults", ours=True), Entrant("openssh", "9.2", "AES"), Entrant("yamux", "v0.1.2", "windows"),
        Entrant("haproxy", "2.6", "threads", reference=True),
    ]  # fmt: skip
    made.left_out = {"frp": "go is missing"}
    for peer, rate in (("konnektor", 500), ("openssh", 600), ("yamux", 300), ("haproxy", 900)):
        for factor in (0.9, 1.0, 1.2):
            made.add("up", peer, {"rate": rate * factor, "CPU": 2000 / rate * factor})
            made.add("beside", peer, {"p50": 1000 / rate, "p99": 9.0, "bulk": rate, "kept": 80.0})
    made.add("streams", "openssh", {"1 open": 2.0})
    made.fail("streams", "openssh", "10,000 streams were not open")
    made.add("memory", "konnektor", {"control plane": 2.0, "worker": 4.5})
    return made


def test_json_brings_back_what_was_saved(results, tmp_path):
    results.save(tmp_path / "deeper" / "bench.json")
    assert Results.load(tmp_path / "deeper" / "bench.json") == results


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 0}', '{"format": 1, "unknown": 2, "machine": {}, "peers": []}']
)
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    done = subprocess.run([sys.executable, "-m", "bench.report", tmp_path / "x.json"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{tmp_path}/x.json is not a result of python -m bench --json (format 1)\n"


def test_the_pace_of_the_machine_is_said(results):
    assert "pace" not in " ".join(lines(results))
    results.paces = [55.1, 97.0, 60.0]
    assert "60.0 (55.1-97.0) us" in " ".join(lines(results))


def test_the_best_peer_is_none_of_ours_and_does_the_same_job(results):
    assert best(results, "up", "rate") == ("openssh", 600)
    assert best(results, "up", "CPU")[0] == "openssh"
    assert best(results, "down", "rate") is None


def test_goals_are_judged_in_their_direction(results):
    assert not verdict(results, "up", "rate").reached  # 500 of 600
    assert not verdict(results, "up", "CPU").reached  # 4.0 of 3.3
    assert verdict(results, "beside", "kept").reached  # 80 of 75
    assert verdict(results, "memory", "control plane").reached
    assert not verdict(results, "memory", "worker").reached  # 4.5 of 4
    assert verdict(results, "path50", "up") is None  # not measured
    results.samples["up"]["konnektor"]["rate"] = [600.0]
    assert verdict(results, "up", "rate").reached


def test_every_goal_is_of_a_figure_that_exists():
    for goal in GOALS:
        assert goal.figure in {figure.name for figure in COLUMNS[goal.column].figures}, goal


def test_figures_are_named_once_in_a_column():
    for column in COLUMNS.values():
        names = [figure.name for figure in column.figures]
        assert len(names) == len(set(names)), column.name


def test_tables_show_medians_and_ranges_and_what_failed(results):
    found = {table.title: table for table in tables(results)}
    up = found["up"]
    assert up.heads == ["", "rate MB/s", "CPU s/GB", "idle %"]
    assert [[cell.text for cell in row[:2]] for row in up.rows][:2] == [
        ["konnektor", "500 (450-600)"],
        ["openssh", "600 (540-720)"],
    ]
    assert up.rows[0][1].missed and not up.rows[1][1].missed
    assert found["streams"].notes == ["openssh, streams: 10,000 streams were not open"]
    assert [cell.text for cell in found["streams"].rows[0]][:2] == ["konnektor", "-"]


def test_the_table_of_goals_has_ratios(results):
    rows = {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in goals(results).rows}
    assert rows["up", "rate MB/s"] == ["500 (450-600)", "600 openssh", "0.83", "OpenSSH's or more: 600", "missed"]
    assert rows["memory", "worker KB/stream"] == ["4.50", "-", "-", "4 KB or less: 4.00", "missed"]


def test_markdown_marks_what_was_missed(results, tmp_path):
    text = "\n".join(lines(results))
    assert "| konnektor | **500 (450-600)** ✗ | **4.00" in text
    assert "| frp | left out | go is missing |" in text
    assert "A processor, 2 cores, 24 GB" in text and "`python -m bench --repeats 3`" in text
    tables_of_it = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables_of_it) == 6
    for table in tables_of_it:
        assert len({line.count("|") for line in table}) == 1, table


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (99.94, "99.9"), (9.994, "9.99"), (0.1234, "0.123"), (0.0, "0.000")]
)
def test_three_figures(value, text):
    assert show(value) == text


def test_the_terminal_shows_it_in_red(results, monkeypatch):
    if importlib.util.find_spec("rich") is None:
        lacking("rich is not installed: the extra `bench` has it")
    from rich.console import Console

    from bench.report import terminal

    console = Console(record=True, width=160, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    terminal.show_tables(results)
    text = console.export_text(styles=True)
    assert re.search(r"\x1b\[1;31m *500 \(450-600\)", text) and not re.search(r"\x1b\[1;31m *600 \(540-720\)", text)
    assert "frp is left out: go is missing" in text


def test_plots_are_the_same_each_time(results, tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        lacking("matplotlib is not installed: the extra `bench` has it")
    written = []
    for directory in (tmp_path / "a", tmp_path / "b"):
        results.save(tmp_path / "r.json")
        done = subprocess.run(
            [sys.executable, "-m", "bench.report", tmp_path / "r.json", "--svg", directory],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        written.append({file.name: file.read_bytes() for file in directory.iterdir()})
    assert set(written[0]) == {"bulk.svg", "cpu.svg", "beside.svg", "memory.svg", "streams.svg"}
    assert written[0] == written[1]
    assert b"konnektor" in written[0]["bulk.svg"]


def test_without_matplotlib_there_is_a_sentence(results, tmp_path, capsys, monkeypatch):
    from bench.report.__main__ import write_plots

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.report.plots", raising=False)
    write_plots(results, tmp_path)
    assert capsys.readouterr().err == "no plots: the package matplotlib is missing; the extra `bench` has it\n"
