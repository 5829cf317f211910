"""What a mistake in the flags is told beyond click's own words: what to write, or which command was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Final

import click

__all__ = ["explain_usage"]

_ALIKE: Final = 0.75
"""How much of a flag, without its dashes, another must have in common to be the one that was meant."""


def explain_usage(error: click.ClickException, root: click.Command) -> str:
    """The message for an error that click raised.

    Args:
        error: the error.
        root: the command of which all others are parts.
    """
    if isinstance(error, click.NoSuchOption):
        return f"{error.message.removesuffix('.')}{_meant(error, root)}"
    text = error.format_message()
    if isinstance(error, click.MissingParameter) and (example := _example(error.param)):
        return f"{text.removesuffix('.')}; write for example {example}"
    return text


def _meant(error: click.NoSuchOption, root: click.Command) -> str:
    flag = error.option_name
    owners = [path for path, command in _commands(root, "konnektor") if flag in _flags(command)]
    if owners:
        return f"; it belongs to {' and '.join(owners)}"
    alike = [f"'{other}'" for other in error.possibilities or () if _ratio(flag, other) >= _ALIKE]
    return f"; did you mean {' or '.join(alike)}?" if alike else "; see --help for those there are"


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lstrip("-"), other.lstrip("-")).ratio()


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from _commands(sub, f"{path} {name}")


def _flags(command: click.Command) -> set[str]:
    return {spelling for param in command.params for spelling in param.opts}


def _example(param: click.Parameter | None) -> str | None:
    """The first example in the help of an option."""
    if not isinstance(param, click.Option):
        return None
    found = re.search(rf"{re.escape(param.opts[0])} \S+", param.help or "")
    return found[0] if found else None
