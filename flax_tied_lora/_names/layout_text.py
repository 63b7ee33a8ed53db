"""A layout as a line of a table has it, read: ``"in heads dim -> (heads dim) in"``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<index>\d+)|\{(?P<field>[A-Za-z_]\w*)\}"
                    r"|(?P<open>\()|(?P<close>\)))\s*")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout as a line of a table has it.

    Attributes:
      ndim: how many axes the Flax leaf has.
      dims: as in `TorchWeight`.
      part: as in `TorchWeight`, but with a placeholder's name where that holds the index.
      names: ``{name: axis}`` of the leaf's axes that have one.
    """

    ndim: int
    dims: tuple[tuple[int, ...], ...]
    part: tuple[tuple[int, int | str], ...]
    names: tuple[tuple[str, int], ...]


def parse_layout(text: str) -> Layout:
    """Returns a layout, given its text: ``"in heads dim -> (heads dim) in"``.

    On the left the leaf's axes, in order: a name, or for an axis of which the parameter is one
    slice, its index or the placeholder (``{expert}``) that holds it. On the right the parameter's
    axes: a name, several in brackets that are one axis, or 1 for an axis of size 1.

    Raises:
      ValueError: what is wrong with it.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"layout {text!r} has no '->' between the Flax and the PyTorch axes")
    names: dict[str, int] = {}
    part: list[tuple[int, int | str]] = []
    for axis, (what, value) in enumerate(_tokens(left, text)):
        if what == "name":
            if value in names:
                raise ValueError(f"layout {text!r} has {value!r} twice on the left")
            names[value] = axis
        elif what in ("index", "field"):
            part.append((axis, int(value) if what == "index" else value))
        else:
            raise ValueError(f"layout {text!r} has brackets on the left: they belong on the right")
    dims = tuple(
        tuple(_axis(names, n, text) for n in group) for group in _groups(_tokens(right, text), text)
    )
    used = [axis for group in dims for axis in group]
    missing = [n for n, axis in names.items() if used.count(axis) != 1]
    if missing:
        raise ValueError(f"layout {text!r} must have {missing[0]!r} once on the right")
    return Layout(len(names) + len(part), dims, tuple(part), tuple(names.items()))


def _tokens(side: str, text: str) -> Iterable[tuple[str, str]]:
    start = 0
    while start < len(side.rstrip()):
        token = _TOKEN.match(side, start)
        if not token:
            raise ValueError(f"layout {text!r} has {side[start:].strip()!r}, which is no axis")
        start = token.end()
        assert token.lastgroup
        yield token.lastgroup, token[token.lastgroup]


def _groups(tokens: Iterable[tuple[str, str]], text: str) -> Iterable[list[str]]:
    group: list[str] | None = None
    for what, value in tokens:
        match what:
            case "open" if group is None:
                group = []
            case "close" if group is not None:
                yield group
                group = None
            case "name" if group is not None:
                group.append(value)
            case "name":
                yield [value]
            case "index" if value == "1" and group is None:
                yield []
            case _:
                raise ValueError(f"layout {text!r}: {value!r} is out of place on the right")
    if group is not None:
        raise ValueError(f"layout {text!r} has a bracket that is not closed")


def _axis(names: dict[str, int], name: str, text: str) -> int:
    if name not in names:
        raise ValueError(f"layout {text!r} has {name!r} on the right and not on the left")
    return names[name]
