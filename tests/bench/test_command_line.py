"""The command line: what it refuses, and a real run."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.__main__ import DEFAULT
from bench.peers import PEERS
from bench.results import Results
from tests.tools import needs


def run_bench(*args):
    return subprocess.run([sys.executable, "-m", "bench", *args], capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--peers", "openssh,telnet"], "'telnet' is no peer: choose from konnektor, openssh,"),
        (["--peers", "openssh,"], "'' is no peer: choose from"),
        (["--columns", "bulks"], "'bulks' is no column: choose from bulk, requests,"),
        (["--repeats", "0"], "--repeats and --seconds must be above 0"),
        (["--against", "/nowhere"], "/nowhere is no checkout of konnektor"),
        (["--against", "other=/nowhere"], "/nowhere is no checkout of konnektor"),
        (["--against", "=."], "--against =. has no name before its '='"),
        (["--against", "konnektor=."], "two of the trees or peers have the same name"),
        (["--konnektor", "/nowhere"], "/nowhere is no checkout of konnektor"),
    ],
)
def test_bad_arguments_get_one_sentence(args, sentence):
    done = run_bench(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_who_is_measured_without_being_named():
    assert set(PEERS) - set(DEFAULT) == {"sketch"}


def test_a_run_that_is_ended_leaves_no_process_behind():
    for tool in ("iperf3", "wrk", "nginx"):
        needs(tool)
    command = [sys.executable, "-m", "bench", "--peers=direct", "--columns=up", "--repeats=1", "--seconds=30"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        while len(members(bench.pid)) < 4 and bench.poll() is None:  # itself, and what it measures by now
            time.sleep(0.1)
        bench.terminate()
        _, told = bench.communicate(timeout=50)
    assert "interrupted" in told
    assert not members(bench.pid)


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_isolation_that_is_ended_leaves_no_process_behind(signal_name):
    command = [sys.executable, "-m", "bench.isolation", "--seconds=19", "--repeats=1", "--only=a peer that never reads"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as measuring:
        while len(members(measuring.pid)) < 5 and measuring.poll() is None:  # itself, its tracker, and three ends
            time.sleep(0.1)
        measuring.send_signal(getattr(signal, signal_name))
        _, told = measuring.communicate(timeout=50)
    assert measuring.returncode == 130 and told == "interrupted\n"
    for _ in range(50):  # multiprocessing's tracker goes by itself once nobody is left
        if not members(measuring.pid):
            break
        time.sleep(0.1)
    assert not members(measuring.pid)


def members(session):
    """The processes of a session, but for those that are over and not yet waited for (proc_pid_stat(5))."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of, *_ = stat.read_text().rpartition(")")[2].split()
            if int(of) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_a_real_run_of_a_column_or_two(tmp_path):
    for tool in ("iperf3", "wrk", "nginx", "ssh", "sshd"):
        needs(tool)
    done = run_bench(
        "--peers=openssh", "--columns=up,requests1", "--repeats=1", "--seconds=1", f"--json={tmp_path}/r.json"
    )
    assert done.returncode == 0, done.stderr
    found = Results.load(tmp_path / "r.json")
    assert [peer.name for peer in found.peers] == ["konnektor", "openssh"] and not found.failures
    for peer in ("konnektor", "openssh"):
        assert found.median("up", peer, "rate") > 1 and found.median("requests1", peer, "rate") > 1
    assert "konnektor and its goals" in done.stdout
