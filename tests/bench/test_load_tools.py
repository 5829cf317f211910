"""What iperf3 and wrk report, recorded, and how it is read."""

import json
import subprocess
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.columns import tools
from bench.columns.tools import Failed, parse_iperf, parse_wrk

SAMPLES = Path(__file__).parent / "samples"


def test_one_direction():
    transfer = parse_iperf((SAMPLES / "iperf3-down.json").read_bytes())
    assert transfer.rate == pytest.approx(1431.2, abs=0.1) and transfer.bytes == 1434058752


def test_both_directions_are_added():
    transfer = parse_iperf((SAMPLES / "iperf3-bidir.json").read_bytes())
    assert transfer.rate == pytest.approx(736.46 + 324.93, abs=0.1) and transfer.bytes == 744488960 + 328466432


@pytest.mark.parametrize(
    ("out", "why"),
    [
        (b"", "iperf3 reported nothing"),
        (b'{"end": {}, "error": "unable to connect to server: Connection refused"}', "iperf3: unable to connect"),
        (b'{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}', "iperf3: nothing arrived"),
    ],
)
def test_a_transfer_that_failed(out, why):
    with pytest.raises(Failed, match=why):
        parse_iperf(out)


def test_a_server_that_does_not_start(monkeypatch):
    monkeypatch.setattr(tools.subprocess, "Popen", partial(subprocess.Popen, executable="/bin/false"))
    with pytest.raises(Failed, match="server did not start"), tools.server(1):
        pass


def test_a_test_that_does_not_end_is_killed(monkeypatch):
    begun, real = [], subprocess.Popen

    def sleep(command, **options):
        process = real(["sleep", "60"], **options)
        begun.append(process)
        return process

    monkeypatch.setattr(tools, "server", lambda _: nullcontext())
    monkeypatch.setattr(tools.subprocess, "Popen", sleep)
    monkeypatch.setattr(tools, "PATIENCE", 0.1)
    peer = SimpleNamespace(ports={"iperf": 1}, targets={"iperf": 2})
    with pytest.raises(Failed, match="did not end within"):
        tools.transfer(peer, 0)
    assert begun[0].returncode is not None


def test_requests():
    load = parse_wrk((SAMPLES / "wrk.txt").read_text())
    assert load.rate == pytest.approx(89051.6, abs=0.1)
    assert load.figures() == {"p50": 0.014, "p99": 3.237, "p99.9": 4.93}


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ((SAMPLES / "wrk-errors.txt").read_text(), "39234 requests failed"),
        ("unable to connect to 127.0.0.1:9 Connection refused\n", "nothing: unable to connect to 127.0.0.1:9"),
        ('result {"seconds": 1.0, "requests": 0, "errors": 0, "latency": {}}', "no request was answered"),
    ],
)
def test_a_load_that_failed(out, why):
    with pytest.raises(Failed, match=why):
        parse_wrk(out)


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1"), (1, "1"), (1.6, "2"), (3.0, "3")])
def test_tools_are_given_whole_seconds(seconds, said):
    command = tools.iperf(1, seconds)
    assert command[command.index("-t") + 1] == said


def test_the_script_asks_for_every_percentile():
    script = tools.SCRIPT % ", ".join(f"{p:g}" for p in tools.PERCENTILES)
    assert "ipairs({50, 99, 99.9})" in script and "%%" not in script


def test_samples_are_json():
    for file in SAMPLES.glob("*.json"):
        assert json.loads(file.read_text())["end"]["sum_received"]["bytes"]
