"""README.md does what it says: its console and Python blocks run, in order, in an empty directory.

A console block whose output begins with ``ready``, or with what an HTTP server says, ends with a program that stays, and runs to the
end of the test. ``...`` in an output
stands for anything. Left out are ``make demo``, whose steps tests/examples/test_demo.py runs with less data, and ``make test``.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent
PORTS = ("8443", "8080", "8000")
STAYS = ("ready ", "Serving ")
WITHIN = 20


def console(block):
    """The commands of a block, and the output that it shows."""
    joined = block.replace("\\\n", " ")
    commands = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    return commands, [line for line in joined.splitlines() if not line.startswith("$ ")]


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def ports():
    """Free ports for those that README names."""
    with contextlib.ExitStack() as sockets_of_all:
        sockets = [sockets_of_all.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return {old: str(sock.getsockname()[1]) for old, sock in zip(PORTS, sockets, strict=True)}


@pytest.fixture
def shell(tmp_path):
    """Starts a shell command in the directory of the test; all that still runs is ended, with its children."""
    no_proxy = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env = {**no_proxy, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    running = []

    def start(command, stderr=subprocess.STDOUT):
        process = subprocess.Popen(
            ["sh", "-ec", command],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def first_line(process):
    watchdog = threading.Timer(WITHIN, process.kill)
    watchdog.start()
    try:
        return process.stdout.readline().rstrip("\n")
    finally:
        watchdog.cancel()
        watchdog.join()


def matches(output, expected):
    pattern = "\n".join(re.escape(line) if line != "..." else "(?s:.*)" for line in expected)
    return re.fullmatch(pattern, output.rstrip("\n"))


@pytest.mark.needs_tool("curl")
def test_blocks_run_in_order(shell, ports, tmp_path, stack):
    ran = 0
    hello = tmp_path / "site" / "hello.txt"
    log = stack.enter_context((tmp_path / "log").open("w"))
    for language, text in BLOCKS:
        block = re.sub(rf"(?<=[: ])({'|'.join(PORTS)})\b", lambda port: ports[port[0]], text)
        if language == "console":
            commands, expected = console(block)
            if commands[0].startswith("make "):
                continue
            endpoint = commands.pop() if expected and expected[0].startswith(STAYS) else None
            for command in commands:
                output, _ = (process := shell(command)).communicate(timeout=WITHIN)
                assert process.returncode == 0, output
                if (
                    endpoint is None and expected and command is commands[-1]
                ):  # the output of a block is its last command's
                    assert matches(output, expected), output
            if endpoint is not None:
                assert first_line(shell(f"exec {endpoint}", log)) == expected[0]
                if "http.server" in endpoint:
                    # What anyone may fetch now is what was put there for it, and no key.
                    assert endpoint.split("--directory ")[1].split()[0] == "site"
                    assert list((tmp_path / "site").iterdir()) == [hello]
        elif language == "python":
            (tmp_path / "program.py").write_text(block)
            output, _ = (process := shell("python -X dev program.py")).communicate(timeout=WITHIN)
            assert process.returncode == 0, output
            assert "HTTP/1.0 200 OK" in output and output.rstrip().endswith("\n" + hello.read_text().rstrip())
        else:
            continue
        ran += 1
    assert ran == 6


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for language, block in BLOCKS:
        if language == "console":
            for command in console(block)[0]:
                if command.startswith("make "):
                    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_embedding_takes_twelve_lines():
    (program,) = [block for language, block in BLOCKS if language == "python"]
    assert len([line for line in program.splitlines() if line]) <= 12


def test_every_flag_is_on_the_screen_and_every_flag_there_exists():
    from konnektor.cli.main import cli

    (screen,) = [block for language, block in BLOCKS if language == "text"]
    sections = re.split(r"^(?=konnektor |both:)", screen, flags=re.MULTILINE)
    for words in (["pki", "init"], ["pki", "issue"], ["control-plane"], ["worker"], ["demo"]):
        command = cli
        for word in words:
            command = command.commands[word]
        (section,) = [text for text in sections if re.sub(" +", " ", text).startswith(f"konnektor {' '.join(words)} ")]
        both = next(text for text in sections if text.startswith("both:"))
        if words in (["control-plane"], ["worker"]):
            section += both
        # Of an option with several spellings, one is enough. Another command's in an explanation is not meant.
        shown = set(re.findall(r"(?<![\w-])--?[a-z][-a-z]*", re.sub(r"(that|as) .*", "", section)))
        known = [set(option.opts) for option in command.params]
        assert all(shown & spellings for spellings in known), words
        assert shown <= set().union(*known), words


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = (ROOT / document).parent / file if file else ROOT / document
            assert path.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
                assert anchor in slugs, target
