"""Tables and plots of a run that is over: ``python -m bench.report build/bench.json --svg docs/bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.report.markdown import lines
from bench.results import Results

__all__ = ["main", "write_plots"]


def write_plots(results: Results, directory: Path) -> None:
    """With a sentence on standard error, whatever comes of it."""
    try:
        from bench.report import plots
    except ModuleNotFoundError as error:
        print(f"no plots: the package {error.name} is missing; the extra `bench` has it", file=sys.stderr)
        return
    for file in plots.write(results, directory):
        print(f"wrote {file}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, help="that python -m bench --json wrote")
    parser.add_argument("--svg", metavar="DIR", type=Path, help="write plots there")
    args = parser.parse_args()
    try:
        results = Results.load(args.file)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines(results)))
    if args.svg:
        write_plots(results, args.svg)


if __name__ == "__main__":
    main()
