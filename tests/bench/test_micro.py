"""The micro-benchmarks still run, and assert what they do."""

import importlib.util
import subprocess
import sys

from bench.peers.peer import ROOT
from tests.tools import lacking


def test_micro_benchmarks_run():
    if importlib.util.find_spec("pytest_benchmark") is None:
        lacking("pytest-benchmark is not installed: the extra `bench` has it")
    command = [sys.executable, "-m", "pytest", "bench/micro", "-q", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout[-2000:]
