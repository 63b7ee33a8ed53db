"""Fields of JSON objects from files that may have been edited: each is checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

_MOST = 2**63  # what sizes, ids and checksums are below


class Kind(NamedTuple):
    """What the value of a field may be: in words, and as a test."""

    expected: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


TEXT = Kind("a string", _is_text)
TEXTS = Kind("a list of strings", _all(_is_text))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("an int of at least 0", _is_count)
COUNTS = Kind("a list of ints of at least 0", _all(_is_count))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def one_of(*values: Any) -> Kind:
    """Returns the kind of a field that has one of these values, which are strings or None."""
    return Kind(
        f"one of {', '.join(map(repr, values))}",
        lambda value: (value is None or isinstance(value, str)) and value in values,
    )


def optional(kind: Kind) -> Kind:
    """Returns the kind of a field that may be null, too."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.fits(value))


def check_value(value: Any, where: str, kind: Kind) -> None:
    """Checks a value.

    Raises:
      ValueError: it is of another kind.
    """
    if not kind.fits(value):
        raise ValueError(f"{where} is {repr(value)[:80]}; expected {kind.expected}")


def check_fields(
    entry: Any, where: str, kinds: Mapping[str, Kind], may_lack: Collection[str] = ()
) -> None:
    """Checks an object's fields.

    Args:
      entry: what is to be an object.
      where: what it is called in errors.
      kinds: of the fields by their names.
      may_lack: names of fields that it may be without.

    Raises:
      KeyError: a field is missing.
      ValueError: it is no object, has a field too many, or one of another kind.
    """
    check_value(entry, where, OBJECT)
    for name in entry:
        if name not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"{where} has a field {name[:80]!r}; expected none but {known}")
    for name, kind in kinds.items():
        if name in entry:
            check_value(entry[name], f"{where}.{name}", kind)
        elif name not in may_lack:
            raise KeyError(f"{where}.{name}")
