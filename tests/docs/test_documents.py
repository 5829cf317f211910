"""The documents say what the code does, as far as that can be compared by a machine."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import konnektor
from konnektor import credit, errors, flight, frames, limits, liveness, policy
from konnektor.cli.main import EXIT_STATUS, cli
from konnektor.settings import FLOORS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text()
OPERATIONS = (DOCS / "operations.md").read_text()


def rows(text, heading):
    """The cells of the table that begins with this heading."""
    table = text.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def test_generated_parts_are_up_to_date():
    command = [sys.executable, "-W", "error", DOCS / "generate_states.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_every_frame_is_specified():
    table = {name: (int(number, 16), place, payload) for number, name, place, payload in rows(PROTOCOL, "type")}
    assert {name: number for name, (number, _, _) in table.items()} == {f.name: int(f) for f in frames.FrameType}
    for name, (number, place, _) in table.items():
        assert (place == "stream") is frames._RULES[number].of_stream, name


def test_fixed_lengths_are_the_sum_of_their_fields():
    sizes = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
    for number, name, _, payload in rows(PROTOCOL, "type"):
        rule = frames._RULES[int(number, 16)]
        fields = re.findall(r": (u\d+|\d+ bytes)", payload)
        least = sum(sizes.get(field) or int(field.split()[0]) for field in fields) + 4 * ("magic" in payload)
        if name != "OPEN":
            assert least == rule.least, name
        most = frames.MAX_TEXT if payload.endswith("text") else 0
        if rule.most not in (frames.MAX_PAYLOAD, frames.MAX_HELLO, frames.MAX_OPEN):
            assert least + most == rule.most, name


def test_every_parameter_is_specified():
    (parameters, settings) = re.findall(r"^\| id \|.*?\n\n", PROTOCOL, re.MULTILINE | re.DOTALL)
    for table, enum in ((parameters, frames.OpenTLV), (settings, frames.HelloTLV)):
        listed = {int(number): name for number, name in re.findall(r"^\| (\d+) \| (\w+) \|", table, re.MULTILINE)}
        assert listed == {int(tlv): tlv.name for tlv in enum}


def test_settings_and_floors():
    (settings,) = re.findall(r"^\| id \| setting.*?\n\n", PROTOCOL, re.MULTILINE | re.DOTALL)
    default = limits.Limits()
    for name in ("max_frame", "initial_window", "initial_streams", "idle_timeout"):
        (row,) = [line for line in settings.splitlines() if f"| {name.upper()} |" in line]
        scale = 1000 if name == "idle_timeout" else 1
        numbers = [f"{int(value * scale):,}" for value in (getattr(FLOORS, name), getattr(default, name))]
        assert row.split(" | ")[-2:] == [numbers[0], f"{numbers[1]} |"]


def test_numbers_of_this_implementation():
    default = limits.Limits()
    size = limits.format_size
    for sentence in (
        f"after {size(default.ack_bytes)} (headers included) or {default.ack_delay * 1000:g} ms",
        f"cap = max({size(default.flight_floor)}, 2 * rate",
        f"B is {size(default.receive_pool)}",
        f"W becomes min(4 W, {size(default.max_window)}, W + 4 excess)",
        f"{credit.TURN * 1000:g} ms are the ends' own turns",
        f"After {credit.IDLE:g} s without a judgement",
        f"or {size(credit.STEP)}.",
        f"in flight when it was sent. Bulk pauses for one every {flight.CLEAN_EVERY} round trips",
        f"if at most {size(flight.CLEAN_FLIGHT)} were in flight",
        f"for at most four of them or {flight.DRAIN_LIMIT:g} s",
        f"full for {liveness.STUCK:g} s in which no ACK came",
        f"A PING that is not answered for {liveness.UNANSWERED:g} s",
        f"A round trip of more than {flight.LONGEST:g} s",
        f"every {liveness.PING_INTERVAL:g} s while sequenced frames flow",
        f"within {default.hello_timeout:g} s",
        f"{default.open_deadline:g} s if absent, at most {limits.MAX_DEADLINE:g} s",
    ):
        words = re.sub(r"(\d+)([KMG]iB)", r"\1 \2", sentence)
        assert words in " ".join(PROTOCOL.split()), words


def test_every_exported_name_is_in_the_api_document():
    text = re.sub(r"^```.*?^```$", "", (DOCS / "api.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert set(konnektor.__all__) <= names


def strings_of_the_source():
    """Every text in the source; the parts of a formatted one each by themselves."""
    for path in ROOT.glob("konnektor/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize("heading", ["message", "answer"])
def test_messages_exist(heading):
    source = "\n".join(strings_of_the_source())
    messages = re.findall(r"`([^`]+)`", " ".join(row[0] for row in rows(OPERATIONS, heading)))
    assert len(messages) > 10
    for message in messages:
        # An ellipsis stands for what is filled in; so do the names below, which are filled in always alike.
        text = re.sub(r"the control plane at|konnektor/1|ECONNREFUSED|^\d{3} ", "…", message)
        for part in text.split("…"):
            assert part.strip(" :,;") in source, message


def test_exit_statuses():
    table = {int(status): meaning for status, meaning in rows(OPERATIONS, "status")}
    assert set(table) == {0, 1, 2, 3, 4, 5, 130}
    assert {status for _, status in EXIT_STATUS} <= set(table)
    assert dict(EXIT_STATUS)[errors.ListenError] == 4 and table[4] == "cannot listen"


def test_special_addresses():
    text = (DOCS / "security.md").read_text()
    documented = {cell for row in rows(text, "special") for cell in re.findall(r"`([^`]+)`", row[1])}
    known = {network for network, _ in (*policy._SPECIAL_V4, *policy._SPECIAL_V6)}
    assert documented == {re.sub(r"(?<!:)/32$|/128$", "", network) for network in known}


def test_console_blocks_name_real_commands_and_flags():
    for block in re.findall(r"^```(?:console|ini)\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL):
        for line in re.findall(r"konnektor ((?:pki|control-plane|worker).*)", block.replace("\\\n", " ")):
            words = line.split()
            command = cli
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            known = {spelling for option in command.params for spelling in option.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_the_wrapper_tells_systemd_of_the_ready_line(tmp_path):
    (script,) = re.findall(r"^```bash\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL)
    endpoint = tmp_path / "konnektor"
    for path, text in (
        (tmp_path / "wrapper", script.replace("/opt/konnektor/bin/konnektor ", f"{endpoint} ")),
        (tmp_path / "systemd-notify", f'#!/bin/sh\necho "$@" >{tmp_path}/told\n'),
        # The reader runs beside it: an endpoint lives longer than it takes to read a line.
        (endpoint, f"#!/bin/sh\necho 'ready worker='$1\nwhile ! [ -s {tmp_path}/told ]; do sleep 0.05; done\nexit 5\n"),
    ):
        path.write_text(text)
        path.chmod(0o700)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([tmp_path / "wrapper", "a b"], env=env, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (5, "ready worker=a b\n", "")
    assert (tmp_path / "told").read_text() == "--ready\n"


def test_vectors_are_where_the_protocol_says():
    assert json.loads((ROOT / "tests/vectors/frames.json").read_text())
