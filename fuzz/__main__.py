"""Runs the fuzz targets, or replays what one of them found.

    python -m fuzz run decoder --seconds 60
    python -m fuzz replay build/fuzz/decoder/crashes/crash-...

A crash is written to ``build/fuzz/TARGET/crashes``. Inputs that reach new code stay in ``build/fuzz/TARGET/corpus``, and the
next run goes on from there.
"""

import argparse
import hashlib
import importlib
import sys
from pathlib import Path

TARGETS = "decoder", "sessions"
BUILD = Path("build/fuzz")
MEMORY = 1024
"""MiB of the process; beyond it, an input is a finding."""
SLOWEST = 20
"""Seconds after which an input is a finding."""


def run(name: str, seconds: int) -> None:
    """Fuzzes one target; does not return: libFuzzer ends the process, with status 0 if nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["konnektor"]):
        target = importlib.import_module(f"fuzz.{name}")
    corpus, crashes, seeds = (BUILD / name / part for part in ("corpus", "crashes", "seeds"))
    for folder in (corpus, crashes, seeds):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        if len(seed) <= target.MAX_INPUT:
            (seeds / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "max_len": target.MAX_INPUT,
        "rss_limit_mb": MEMORY,
        "timeout": SLOWEST,
        "artifact_prefix": f"{crashes}/",  # of slow inputs and large ones
        "print_final_stats": 1,
        "verbosity": 1,
    }
    arguments = [f"-{key}={value}" for key, value in options.items()]

    def one(data: bytes) -> None:
        try:
            target.one(data)
        except BaseException:
            # libFuzzer would write it, too, but only at its exit, where its own alarm may kill the process first.
            (crashes / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(seeds)], one)
    atheris.Fuzz()


def replay(files: list[Path]) -> None:
    """Runs a target once with each input, as it stands under ``build/fuzz/TARGET``."""
    for file in files:
        name = next((part for part in reversed(file.parts) if part in TARGETS), None)
        if name is None:
            sys.exit(f"{file}: its path names no target ({', '.join(TARGETS)})")
        print(f"{name} {file}", flush=True)
        importlib.import_module(f"fuzz.{name}").one(file.read_bytes())
    print("no error")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the pure core, or replay an input.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="fuzz one target for a time")
    running.add_argument("target", choices=TARGETS)
    running.add_argument("--seconds", type=int, default=60)
    replaying = commands.add_parser("replay", help="run a target once with each of these inputs")
    replaying.add_argument("file", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "run":
        run(args.target, args.seconds)
    else:
        replay(args.file)


if __name__ == "__main__":
    main()
