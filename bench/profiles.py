"""Where the time goes, by py-spy: ``python -m bench.profiles``, a table and two flame graphs for each case.

Both endpoints run as the benchmark runs them, under the load of one of its columns, and py-spy looks at each of them a
hundred times a second, native frames included: without these all of uvloop, OpenSSL and the kernel would count for the line of
Python that called it last. For that py-spy must stop the process while it looks (``--nonblocking`` has no native stacks, and
tears Python's now and then). What is stopped makes no progress and is not counted, so shares stay what they are, and
rates are lower; take those of ``python -m bench``. How much of the time is system calls is the kernel's word (see ``weighed``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import IO, Final

from bench.__main__ import Wrong, choose
from bench.columns import COLUMNS, Figures
from bench.columns.beside import BESIDE
from bench.columns.tools import Failed
from bench.peers import Konnektor, Peer
from bench.peers.peer import SIDES, said
from bench.processes import interruptible, raise_descriptor_limit, user_and_system
from bench.report.flames import draw
from bench.results import Machine
from bench.stacks import Group, Stacks, grouped, parse, weighed
from bench.targets import missing_tools, targets

__all__ = ["CASES", "Case", "Profile", "main", "profile", "py_spy", "recording", "table"]

RATE: Final = 100
"""Looks a second; each takes some of a core from what is looked at."""
PATIENCE: Final = 30.0
"""Seconds that py-spy may take to begin, and to write: it reads the symbols of every library."""
SETTLE: Final = 0.3


@dataclass(frozen=True)
class Case:
    """One kind of load.

    Attributes:
        about: what it is.
        load: makes it, of a peer for so many seconds.
    """

    about: str
    load: Callable[[Peer, float], Figures]


def _of(column: str) -> Case:
    return Case(COLUMNS[column].about, COLUMNS[column].measure)


CASES: Final = {
    "up": _of("up"),
    "down": _of("down"),
    "request": _of("requests1"),
    "requests": _of("requests32"),
    "connections": _of("connections"),
    "beside": Case("one client's small requests beside four bulk uploads", BESIDE.together),
}


def py_spy() -> str:
    """Its path: beside this Python, or on PATH.

    Raises:
        Wrong: there is none.
    """
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which("py-spy", path=places)
    if found is None:
        raise Wrong("py-spy is missing: the extra `bench` has it, and `make profile` installs that")
    return found


@contextmanager
def recording(pid: int, file: Path) -> Iterator[None]:
    """Has py-spy look at a process for as long as the block takes, and write what it saw.

    Raises:
        Failed: it did not; the text is what it says.
    """
    command = [
        py_spy(), "record", "--pid", str(pid), "--native", "--nolineno", "--rate", str(RATE), "--format", "raw", "--output", str(file),
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            if not any("Sampling process" in line for line in process.stdout):
                process.wait(PATIENCE)
                raise Failed(f"py-spy: {_said(errors)}")
            time.sleep(SETTLE)
            yield
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"py-spy did not end within {PATIENCE:g} s") from None
        finally:
            process.kill()
        if process.returncode or not file.exists():
            raise Failed(f"py-spy: {_said(errors)}")


def _said(errors: IO[str]) -> str:
    """The first line, which says it; a trace of py-spy's own code may follow."""
    errors.seek(0)
    return next((line.strip() for line in errors if line.strip()), "it says nothing")


@dataclass(frozen=True)
class Profile:
    """What one end did.

    Attributes:
        samples: how often it was seen at work.
        stacks: with their weights.
    """

    samples: int
    stacks: Stacks


def profile(case: Case, peer: Peer, seconds: float, directory: Path) -> dict[str, Profile]:
    """What both ends do under a case's load, by side.

    Raises:
        Failed: the load or py-spy failed, or an end was never seen at work.
    """
    pids = {side: peer.sides[side][0].pid for side in SIDES}
    files = {side: directory / f"{side}.raw" for side in SIDES}
    with ExitStack() as stack:
        for side, file in files.items():
            stack.enter_context(recording(pids[side], file))
        before = {side: user_and_system(pid) for side, pid in pids.items()}
        case.load(peer, seconds)
        after = {side: user_and_system(pid) for side, pid in pids.items()}
    found = {}
    for side, file in files.items():
        stacks = parse(file.read_text())
        if not stacks:
            raise Failed(f"py-spy never saw the {side} at work")
        user, system = (late - early for late, early in zip(after[side], before[side], strict=True))
        kernel = system / (user + system) if user + system else nan
        found[side] = Profile(stacks.total(), weighed(stacks, kernel))
    return found


def table(found: Mapping[str, Profile]) -> Iterator[str]:
    """Shares by group, for each side, in Markdown; groups that no side is in are left out."""
    shares = {side: grouped(each.stacks) for side, each in found.items()}
    yield f"| share of the CPU time, % | {' | '.join(found)} |"
    yield "|---" * (1 + len(found)) + "|"
    for group in Group:
        cells = [f"{100 * of_side[group]:.1f}" for of_side in shares.values()]
        if any(of_side[group] for of_side in shares.values()):
            yield f"| {group} | {' | '.join(cells)} |"
    yield f"| samples | {' | '.join(str(each.samples) for each in found.values())} |"


def _write(name: str, case: Case, found: Mapping[str, Profile], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for side, each in found.items():
        file = directory / f"profile-{name}-{side.replace(' ', '-')}.svg"
        file.write_text(draw(each.stacks, f"{side}: {case.about}"))
        print(f"wrote {file}", file=sys.stderr)


def _run(names: Iterable[str], seconds: float, svg: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="konnektor-profiles-") as folder, ExitStack() as stack:
        directory = Path(folder)
        ports = stack.enter_context(targets(directory, raise_descriptor_limit()))
        peer = Konnektor(ports, directory)
        stack.callback(peer.stop)
        for name in names:
            case = CASES[name]
            print(f"{name}: {case.about} ...", file=sys.stderr)
            found = profile(case, peer, seconds, directory)
            _write(name, case, found, svg)
            yield ""
            yield f"{name}, {case.about}:"
            yield ""
            yield from table(found)


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profiles", description=__doc__)
    parser.add_argument("--cases", metavar="NAMES", help=f"with commas: {', '.join(CASES)} (all)")
    parser.add_argument("--seconds", type=float, default=10, help="of each case, whole ones (10)")
    parser.add_argument("--svg", metavar="DIR", type=Path, default=Path("build/profiles"), help="for the flame graphs")
    args = parser.parse_args()
    try:
        names = choose(args.cases, "case", {name: [name] for name in CASES}) if args.cases else list(CASES)
        if args.seconds <= 0:
            raise Wrong("--seconds must be above 0")
        if missing := missing_tools():
            raise Wrong(f"{', '.join(missing)} missing: the load needs iperf3, wrk and nginx (Debian's names, too)")
        version = said([py_spy(), "--version"], r"py-spy (\S+)")
        print(f"`{' '.join(['python -m bench.profiles', *sys.argv[1:]])}`")
        print(f"\n{Machine.here()}; py-spy {version}, {RATE} samples a second, native frames included")
        for line in _run(names, args.seconds, args.svg):
            print(line, flush=True)
    except (Wrong, Failed) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
