"""Measures konnektor beside its peers: ``python -m bench --peers openssh,yamux --columns bulk,requests``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.columns import COLUMNS, Column
from bench.peers import PEERS, Konnektor, Peer
from bench.peers.go import GoPeer
from bench.peers.konnektor import of_tree
from bench.processes import interruptible
from bench.report.__main__ import write_plots
from bench.results import Results
from bench.run import cost, measure, prepare
from bench.targets import missing_tools

__all__ = ["Wrong", "choose", "main"]

FAMILIES: dict[str, list[str]] = {}
for _column in COLUMNS.values():
    FAMILIES.setdefault(_column.family, []).append(_column.name)

DEFAULT = [name for name, peer in PEERS.items() if peer.by_default]


class Wrong(Exception):
    """The command line does not say what to do."""


def choose(text: str, what: str, known: Mapping[str, Iterable[str]]) -> list[str]:
    """Names from a list with commas, each once; ``known`` says what each stands for.

    Raises:
        Wrong: one is not known.
    """
    chosen: dict[str, None] = {}
    for name in (part.strip() for part in text.split(",")):
        if name not in known:
            raise Wrong(f"{name!r} is no {what}: choose from {', '.join(known)}")
        chosen.update(dict.fromkeys(known[name]))
    return list(chosen)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    made.add_argument("--peers", metavar="NAMES", help=f"with commas; besides konnektor: {', '.join(PEERS)} "
                      f"({', '.join(DEFAULT)})")  # fmt: skip
    made.add_argument("--columns", metavar="NAMES", help=f"with commas: {', '.join(FAMILIES)} or a single one of "
                      f"{', '.join(COLUMNS)} (all)")  # fmt: skip
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--seconds", type=float, default=2, help="of each measurement, whole ones (2)")
    made.add_argument("--konnektor", metavar="TREE", type=Path,
                      help="what is measured as konnektor: a checkout or a build (this checkout)")  # fmt: skip
    made.add_argument("--against", metavar="[NAME=]TREE", action="append", default=[],
                      help="another one that is measured beside it, by the name of its directory; may be repeated")  # fmt: skip
    made.add_argument("--json", metavar="FILE", type=Path, help="write every sample here")
    made.add_argument("--svg", metavar="DIR", type=Path, help="write plots there")
    return made


def tree_of(text: str | Path) -> Path:
    tree = Path(text)
    if not (tree / "konnektor" / "__init__.py").is_file():
        raise Wrong(f"{tree} is no checkout of konnektor")
    return tree


def chosen_peers(args: argparse.Namespace) -> list[type[Peer]]:
    names = choose(args.peers, "peer", {name: [name] for name in PEERS}) if args.peers else DEFAULT
    ours = Konnektor if args.konnektor is None else of_tree(tree_of(args.konnektor), Konnektor.name)
    others = []
    for text in args.against:
        name, equals, tree = text.rpartition("=")
        if equals and not name:
            raise Wrong(f"--against {text} has no name before its '='")
        others.append(of_tree(tree_of(tree), name))
    chosen: list[type[Peer]] = [ours, *others, *(PEERS[name] for name in names if name != Konnektor.name)]
    if len({peer.name for peer in chosen}) < len(chosen):
        raise Wrong("two of the trees or peers have the same name")
    return chosen


def chosen_columns(args: argparse.Namespace) -> list[Column]:
    names = (
        choose(args.columns, "column", {**FAMILIES, **{name: [name] for name in COLUMNS}}) if args.columns else COLUMNS
    )
    return [COLUMNS[name] for name in names]


@interruptible()
def main() -> None:
    args = parser().parse_args()
    try:
        peers, columns = chosen_peers(args), chosen_columns(args)
        if args.repeats < 1 or args.seconds <= 0:
            raise Wrong("--repeats and --seconds must be above 0")
        if missing := missing_tools():
            raise Wrong(
                f"{', '.join(missing)} missing: the benchmark needs iperf3, wrk and nginx (Debian's names, too)"
            )
        try:
            from bench.report.terminal import show_tables, watch
        except ModuleNotFoundError:
            raise Wrong(
                "the package rich is missing: the extra `bench` has it, and `make bench` installs that"
            ) from None
    except Wrong as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    results = Results(" ".join(["python -m bench", *sys.argv[1:]]), args.repeats, args.seconds)
    if any(issubclass(peer, GoPeer) for peer in peers):
        print("building the peers that are written in Go (minutes the first time) ...", file=sys.stderr)
    usable = prepare(peers, results)
    total = cost(usable, columns, args.repeats, args.seconds)
    for name, why in results.left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    print(f"about {max(1, round(total / 60))} min: {len(usable)} peers, {len(columns)} columns", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="konnektor-bench-") as directory, watch(total, args.repeats) as progress:
        try:
            measure(usable, columns, results, Path(directory), progress)
        except KeyboardInterrupt:
            print("interrupted: what was measured follows", file=sys.stderr)
    show_tables(results)
    if args.json:
        results.save(args.json)
    if args.svg:
        write_plots(results, args.svg)
    broken = [column for column, peers in results.failures.items() if Konnektor.name in peers]
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
