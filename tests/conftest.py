"""What every test runs under: both event loops, leak checks, Hypothesis profiles.

An async test runs twice, on asyncio (in debug mode) and on uvloop, and fails if it leaves behind a task, a file
descriptor, an error that only the loop's exception handler saw, or an object that warns when it is collected.
"""

import asyncio
import gc
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from hypothesis import HealthCheck, settings

import konnektor.mux
from tests.tools import needs

SETTLE = 2.0
"""Seconds that what a test closed may take to be gone."""

FDS = Path("/proc/self/fd")


# A shared machine can be slow at any moment: no deadline, and no complaint about slow generation. Another profile than
# these two defaults: pytest --hypothesis-profile nightly.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
_LIMITED = {**_COMMON, "stateful_step_count": 60}
settings.register_profile("dev", max_examples=50, **_LIMITED)
settings.register_profile("ci", max_examples=200, derandomize=True, database=None, **_LIMITED)
# Until a run ends Hypothesis keeps up to 10,000 of its examples, choice by choice (its engine's CACHE_SIZE), and the
# model's take 0.7 MB each. So a night is not one run but many of these: "make nightly".
settings.register_profile("nightly", max_examples=1_000, stateful_step_count=200, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


def pytest_collection_finish(session):
    # Everything imported so far lives to the end: out of the collector's sight, a full collection per test is cheap.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs_tool"):
        for tool in mark.args:
            needs(tool)
    if item.get_closest_marker("replaces_methods") and not konnektor.mux.__file__.endswith(".py"):
        pytest.skip("what is compiled does not let its methods be replaced")


@pytest.fixture(autouse=True)
def leak_check(request):
    """Checks each async test, after its own fixtures are down and before its loop is closed."""
    if pytest_asyncio.is_async_test(request.node):
        request.getfixturevalue("_leak_check")


@pytest_asyncio.fixture
async def _leak_check():
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.BaseEventLoop):
        loop.set_debug(True)
        loop.slow_callback_duration = 1.0  # a busy machine is no finding
    unhandled = []

    def exception_handler(loop, context):
        unhandled.append(context)
        loop.default_exception_handler(context)

    loop.set_exception_handler(exception_handler)
    tasks, fds = asyncio.all_tasks(), _open_fds()
    yield
    leaks = await _settled(tasks, fds)
    leaks += [f"unhandled: {context.get('exception') or context['message']!r}" for context in unhandled]
    if leaks:
        pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)


async def _settled(tasks, fds):
    """What is still open after ``SETTLE`` seconds; returns at once when nothing is."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SETTLE
    pause = 0.0
    while True:
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
        leaks = [f"task: {task!r}" for task in asyncio.all_tasks() - tasks - {asyncio.current_task()}]
        leaks += [f"file descriptors: {count} of {kind}" for kind, count in (_open_fds() - fds).items()]
        if not leaks or loop.time() >= deadline:
            return leaks
        await asyncio.sleep(pause)
        pause = min(pause + 0.01, 0.1)


def _open_fds():
    """How many file descriptors are open of each kind or path; empty where the system does not tell.

    Counted, not compared one by one: uvloop renews its own pair of sockets each time the loop is run.
    """
    fds = Counter()
    if FDS.is_dir():
        for fd in list(FDS.iterdir()):
            try:
                target = str(fd.readlink())
            except FileNotFoundError:  # the listing's own
                continue
            fds[re.sub(r":\[\d+\]$", "", target)] += 1  # "socket:[4711]" is a socket
    del fds[os.devnull]  # libuv keeps one to get rid of a client when descriptors run out
    return fds
