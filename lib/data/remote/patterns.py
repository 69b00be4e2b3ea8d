"""Names that a pattern stands for: braces, generated one after another, and globs of local files."""

import glob
import os
import re
from collections.abc import Iterator
from itertools import chain

from braceexpand import (  # type: ignore[attr-defined]  # its stubs leave these out
    UnbalancedBracesError,
    char_range_re,
    int_range_re,
    make_char_range,
    make_int_range,
)

from lib.errors import InputError, raised_as
from lib.files import without_secrets

MOST_NAMES = 1_000_000
"""Names that a brace pattern may stand for."""
_MOST_BRACES = 100


def expanded(pattern: str, flag: str) -> Iterator[str]:
    """The names of a brace pattern, as bash has them; a file's own name is taken as it is.

    Raises InputError, naming `flag`, for a brace that is not closed and after MOST_NAMES.
    """
    if os.path.isfile(pattern):
        yield pattern
        return
    with raised_as(lambda fault: _unreadable(fault, pattern, flag), ValueError):
        if pattern.count("{") > _MOST_BRACES:
            raise ValueError
        for number, name in enumerate(_expand(pattern)):
            if number == MOST_NAMES:
                wrong = f"the braces stand for more than {MOST_NAMES:,} names"
                raise InputError(f"{flag} {pattern}: {wrong}; check the numbers")
            yield re.sub(r"\\(.)", r"\1", name)


def _unreadable(error: Exception, pattern: str, flag: str) -> InputError:
    if isinstance(error, UnbalancedBracesError):
        return InputError(f"{flag} {pattern}: a brace is not closed; write it as in 'a-{{0..9}}.tar'")
    # Numbers of thousands of digits, or too many braces.
    return InputError(f"{flag} {without_secrets(pattern)[:100]}...: the braces cannot be read; write 'a-{{0..9}}.tar'")


def local_matches(pattern: str, data: str, flag: str) -> list[str]:
    """The local files of a name or glob, of any type; InputError, naming `flag` and `data`, where there is none."""
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    if not found:
        raise InputError(f"{flag} {data}: there is no file {pattern}; check the folder and the pattern")
    return found


def _expand(pattern: str) -> Iterator[str]:
    """As braceexpand, but lazily: that one makes all names of a range before the first is asked for."""
    head, inside, tail = _first_braces(pattern)
    if inside is None:
        yield head
        return
    for middle in _alternatives(inside):
        for rest in _expand(tail):
            yield head + middle + rest


def _alternatives(inside: str) -> Iterator[str]:
    """The names for the inside of two braces: a range, a list, or neither, whose braces are part of the name."""
    if numbers := int_range_re.match(inside):
        return iter(make_int_range(*numbers.groups()))
    if letters := char_range_re.match(inside):
        return iter(make_char_range(*letters.groups()))
    choices = _split(inside)
    if len(choices) > 1:
        return chain.from_iterable(map(_expand, choices))
    return (f"{{{name}}}" for name in _expand(inside))


def _first_braces(pattern: str) -> tuple[str, str | None, str]:
    """(what stands before the first braces, in them, after them); a backslash takes a brace's meaning away."""
    first = -1
    for place, depth in _depths(pattern, "{}"):
        if depth < 0:
            raise UnbalancedBracesError(pattern)
        first = place if first < 0 else first
        if depth == 0:
            return pattern[:first], pattern[first + 1 : place], pattern[place + 1 :]
    if first >= 0:
        raise UnbalancedBracesError(pattern)
    return pattern, None, ""


def _split(inside: str) -> list[str]:
    """Cut at the commas that stand in no further braces."""
    commas = [place for place, depth in _depths(inside, "{},") if depth == 0 and inside[place] == ","]
    return [inside[begin + 1 : end] for begin, end in zip([-1, *commas], [*commas, len(inside)], strict=True)]


def _depths(pattern: str, marks: str) -> Iterator[tuple[int, int]]:
    """(place, how many braces are open after it) of each mark without a backslash."""
    depth = 0
    for found in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if found[0] in marks:
            depth += (found[0] == "{") - (found[0] == "}")
            yield found.start(), depth
