"""Writes what docs/protocol.md takes from the code: the tables and drawings of a stream's states, and the error codes.

python docs/generate_states.py           # writes docs/protocol.md anew
python docs/generate_states.py --check   # exit status 1 if it is out of date
"""

import ast
import inspect
import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from konnektor import errors, states

S = TypeVar("S", states.Receiving, states.Sending)

DOCUMENT = Path(__file__).with_name("protocol.md")
WORDS = {
    "DO_ACCEPT": "accept()",
    "DO_REFUSE": "refuse()",
    "DO_FINISH": "finish()",
    "DO_RESET": "reset()",
    "DO_STOP": "stop()",
    "SENT_OPEN": "OPEN is sent",
    "SENT_END": "the end is sent",
}


def event_name(event: IntEnum) -> str:
    return WORDS.get(event.name, event.name)


def meanings(kind: type[IntEnum]) -> dict[str, str]:
    """The text below each member in the source."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    name = ""
    for node in body.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
    return found


def machine(kind: type[S], table: Mapping[tuple[S, states.Event], S], starts: list[str]) -> list[str]:
    """What the states mean, the whole table, and a drawing of what changes the state."""
    lines: list[str] = ["| state | meaning |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in meanings(kind).items()]
    events = sorted({event for _, event in table})
    lines += ["", "| in | " + " | ".join(map(event_name, events)) + " |", "|---" * (len(events) + 1) + "|"]
    for state in kind:
        cells = [table.get((state, event)) for event in events]
        lines.append(
            f"| **{state.name}** | " + " | ".join(cell.name if cell is not None else "" for cell in cells) + " |"
        )
    lines += ["", "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {start}" for start in starts]
    moves: dict[tuple[str, str], list[str]] = {}
    for (state, event), following in table.items():
        if state is not following:
            moves.setdefault((state.name, following.name), []).append(event_name(event))
    lines += [f"    {before} --> {after}: {', '.join(names)}" for (before, after), names in moves.items()]
    return [*lines, "    ENDED --> [*]", "```"]


def receiving() -> list[str]:
    return machine(states.Receiving, states.RECEIVE, ["AWAITING: this side opens", "OPEN: the peer opens"])


def sending() -> list[str]:
    return machine(states.Sending, states.SEND, ["UNSENT: this side opens", "UNDECIDED: the peer opens"])


def codes() -> list[str]:
    lines = ["| code | name | exception | meaning |", "|---|---|---|---|"]
    for code in errors.Code:
        error = errors.session_error(code) if code < errors.Code.DENIED else errors.stream_error(code)
        kind = type(error)
        text = "No error." if code == errors.Code.NO_ERROR else str(kind.__doc__).partition("\n")[0]
        lines.append(f"| {int(code)} | {code.name} | `{kind.__name__}` | {text} |")
    return lines


PARTS = {"receiving": receiving, "sending": sending, "codes": codes}


def generate(text: str) -> str:
    """The document with its generated parts as the code has them now."""
    for name, make in PARTS.items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->\n"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{DOCUMENT.name} lacks the line {start!r}")
        after = rest.partition(end)[2]
        text = f"{before}{start}\n" + "\n".join(make()) + f"\n\n{end}{after}"
    return text


if __name__ == "__main__":
    old = DOCUMENT.read_text()
    new = generate(old)
    if "--check" in sys.argv[1:]:
        sys.exit(f"{DOCUMENT} is out of date: run python docs/generate_states.py" if new != old else 0)
    DOCUMENT.write_text(new)
