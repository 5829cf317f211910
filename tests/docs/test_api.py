"""docs/api.md: its samples run, the forms that it gives are ones, and what its readers look for is there."""

import asyncio
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import konnektor as kk
from konnektor.addresses import parse_forward, parse_hostport
from konnektor.frontends.urls import parse_frontend
from konnektor.pki import init_ca, issue
from konnektor.policy import parse_allow, parse_grant_from
from konnektor.priorities import parse_priority
from konnektor.router import parse_grant_route, parse_route
from konnektor.testing import FaultProxy, memory_session_pair

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SAMPLES = "\n".join(re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
NAMES = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", PROSE))))


@pytest.fixture
def samples():
    """What the samples define, all in one module: a later one may use what an earlier one defines."""
    names = {"kk": kk, "FaultProxy": FaultProxy, "memory_session_pair": memory_session_pair}
    exec(compile(SAMPLES, "docs/api.md", "exec"), names)
    return SimpleNamespace(**names)


async def test_a_type_of_your_own(samples):
    await samples.test_greet()


async def test_a_cut_is_a_pause(samples, tmp_path):
    async def answer(reader, writer):
        writer.write(await reader.read())
        writer.close()

    init_ca(tmp_path)
    tls = []
    for role, name in (("control-plane", "cp"), ("worker", "node-1")):
        issued = issue(tmp_path, role, name)
        tls.append(kk.TLSFiles(tmp_path / "ca.pem", issued.cert, issued.key))
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as echo:
        await samples.test_a_cut_is_a_pause(*tls, echo.sockets[0].getsockname()[1])


PARSERS = {
    "listen": lambda text: parse_hostport(text, zero=True),
    "allow": parse_allow,
    "routes": parse_route,
    "grant_routes": parse_grant_route,
    "allow_from": parse_grant_from,
    "priorities": parse_priority,
    "add_frontend": parse_frontend,
    "add_forward": parse_forward,
}


def test_each_form_has_an_example_that_is_one():
    table = TEXT.partition("| argument |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == len(PARSERS)
    for (argument, _, example), (name, parse) in zip(rows, PARSERS.items(), strict=True):
        assert name in argument
        found = eval(example.strip("` |"), {"kk": kk})
        for each in [found] if isinstance(found, str) else found:
            assert isinstance(each, kk.AllowRule) or parse(each)


@pytest.mark.parametrize("kind", [kk.WorkerSnapshot, kk.SessionStats, kk.WorkerConnected, kk.Identity])
def test_every_field_is_named(kind):
    assert {field.name for field in dataclasses.fields(kind)} <= NAMES


@pytest.mark.parametrize("kind", [kk.ControlPlane, kk.Worker])
def test_all_of_an_endpoint_is_named(kind):
    assert {name for name in dir(kind) if not name.startswith("_")} <= NAMES
