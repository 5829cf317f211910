"""Flame graphs: a function is as wide as its share of the time, callers stand above what they call.

py-spy draws them, too, but with native frames its are 200 KB and more each, in colours without a meaning. These have the
colours of the groups in the tables, and nothing that is too narrow to be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate
from typing import Final

from bench.stacks import Frame, Group, Stacks, grouped, lineage, tidy

__all__ = ["draw"]

WIDTH: Final = 1200
ROW: Final = 16
MARGIN: Final = 8
LETTER: Final = 6.3
"""Pixels, about."""
NARROWEST: Final = 0.0025
"""Of the whole; what is narrower is left out."""

COLOURS: Final = {
    Group.RECEIVING: "#f4a582", Group.SENDING: "#e98b6b", Group.POLLING: "#f7c9b4", Group.SYSTEM: "#d98c7a",
    Group.READING: "#8fb8de", Group.WRITING: "#6fa1d2", Group.TLS: "#b3cfe8",
    Group.LOOP: "#d9d9d9", Group.MULTIPLEXER: "#9ccc9c", Group.SPLICE: "#c9b2e0", Group.KONNEKTOR: "#d8dc8c", Group.OTHER: "#eeeeee",
}  # fmt: skip


@dataclass
class _Cell:
    group: Group
    count: float = 0
    callees: dict[tuple[Frame, Group], _Cell] = field(default_factory=dict)


def _tree(stacks: Stacks) -> _Cell:
    root = _Cell(Group.OTHER)
    for stack, count in stacks.items():
        cell = root
        cell.count += count
        frames = tidy(stack)
        for frame, group in zip(frames, lineage(frames), strict=True):
            cell = cell.callees.setdefault((frame, group), _Cell(group))
            cell.count += count
    return root


def draw(stacks: Stacks, title: str) -> str:
    """An SVG."""
    root = _tree(stacks)
    rects: list[str] = []
    depth = 0
    for frame, cell, left, level in _placed(root, 0, 0, root.count * NARROWEST):
        depth = max(depth, level)
        rects.append(_rect(frame, cell, left, level, root.count))
    legend = list(_legend(grouped(stacks)))
    top = MARGIN + 2 * ROW + ROW * len(legend) // 4 + ROW
    height = top + (depth + 1) * ROW + MARGIN
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        "<style>text{font:11px monospace;fill:#222}rect{stroke:#fff;stroke-width:.5}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 10}">{escape(title)}</text>',
        *legend,
        f'<g transform="translate(0 {top})">',
        *rects,
        "</g>",
        "</svg>",
        "",
    ])  # fmt: skip


def _placed(cell: _Cell, left: float, level: int, narrowest: float) -> Iterator[tuple[Frame, _Cell, float, int]]:
    """What a cell calls, with the weight left of each and how deep it is: the widest first."""
    callees = sorted(cell.callees.items(), key=lambda item: -item[1].count)
    begins = accumulate((callee.count for _, callee in callees), initial=left)
    for ((frame, _), callee), begin in zip(callees, begins, strict=False):
        if callee.count >= narrowest:
            yield frame, callee, begin, level
            yield from _placed(callee, begin, level + 1, narrowest)


def _rect(frame: Frame, cell: _Cell, left: float, level: int, total: float) -> str:
    scale = (WIDTH - 2 * MARGIN) / total
    x, width, y = MARGIN + left * scale, cell.count * scale, level * ROW
    letters = int((width - 4) / LETTER)
    label = frame.name if len(frame.name) <= letters else frame.name[: letters - 1] + "…" if letters > 3 else ""
    text = f'<text x="{x + 2:.1f}" y="{y + 12}">{escape(label)}</text>' if label else ""
    return (
        f"<g><title>{escape(str(frame))}: {cell.count / total:.1%}, {cell.group}</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" fill="{COLOURS[cell.group]}"/>{text}</g>'
    )


def _legend(shares: dict[Group, float]) -> Iterator[str]:
    """The groups that there are, four to a row."""
    for number, (group, share) in enumerate((group, share) for group, share in shares.items() if share >= 0.0005):
        x, y = MARGIN + number % 4 * (WIDTH - 2 * MARGIN) // 4, MARGIN + (1 + number // 4) * ROW + 4
        yield (
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[group]}"/>'
            f'<text x="{x + 17}" y="{y + 10}">{escape(group)} {share:.1%}</text>'
        )
