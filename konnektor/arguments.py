"""Arguments that list rules or routes: each is an object, or the text that the command line has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from konnektor.addresses import parse_worker_name, quote
from konnektor.errors import ConfigurationError

__all__ = ["listed", "named", "object_or_text", "split_name"]

T = TypeVar("T")


def listed(what: str, given: Iterable[T], example: str) -> Iterable[T]:
    """What the argument ``what`` lists. Text alone is none: it would be read letter by letter.

    Raises:
        ConfigurationError: one sentence that says what to write, such as ``example``.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigurationError(f"{what} takes a list, not {quote(str(given))}: write {example}")
    return given


def object_or_text(what: str, given: object, kind: type[T], parse: Callable[[str], T], example: str) -> T:
    """One of a list: an object of that ``kind``, or its text.

    Raises:
        ConfigurationError: it is neither, or ``parse`` says why the text is none.
    """
    if isinstance(given, kind):
        return given
    if isinstance(given, str):
        return parse(given)
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise ConfigurationError(f"{what} {given!a:.80} is neither text nor {article} {kind.__name__}: write {example}")


def named(given: object, value: Callable[[object], T], form: str, example: str, pair: str) -> tuple[str, T]:
    """What is granted to a worker: ``NAME=VALUE``, or (name, value), the value as ``value`` takes it.

    Args:
        form: of the value, such as ``ROUTE``.
        example: of the text, ``pair`` of the tuple.

    Raises:
        ConfigurationError: it is neither, or a part of it is not one.
    """
    match given:
        case str():
            name, text = split_name(given, form, example)
            return name, value(text)
        case (str(name), of_name):
            return parse_worker_name(name), value(of_name)
        case _:
            raise ConfigurationError(
                f'grant {given!a:.80} is neither text nor (NAME, {form}): write "{example}" or {pair}'
            )


def split_name(text: str, form: str, example: str) -> tuple[str, str]:
    """The worker's name in front of ``=``, and the text behind it.

    Raises:
        ConfigurationError: there is none, or it is no worker's name.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        raise ConfigurationError(f"grant {quote(text)} names no worker: write NAME={form}, as {example}")
    return parse_worker_name(name), rest
