"""Mappings from regexes to values, asked by the path of a module: as PEFT's rank patterns are."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_V = TypeVar("_V")
_NAME = re.compile(r"[\w./:-]+")


def is_name(pattern: str) -> bool:
    """Returns whether a regex has nothing special in it but dots, which match any character."""
    return _NAME.fullmatch(pattern) is not None


class FrozenMapping(Mapping[str, _V]):
    """A hashable dict that keeps its order, and for which order counts (the first match wins)."""

    def __init__(self, items: Mapping[str, _V] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> _V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    @functools.cached_property
    def index(self) -> Index:
        """Its keys, to be looked up by what they match."""
        return Index(self)


class Index:
    """The patterns of a mapping: ten thousand names are looked up, and only regexes tried.

    Args:
      patterns: in their order.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._order = {pattern: i for i, pattern in enumerate(patterns)}
        self._regexes = [p for p in patterns if not is_name(p)]
        # By length and by where the dots are: names that are as long and have them there.
        self._names: dict[int, dict[tuple[int, ...], dict[str, list[str]]]] = {}
        for pattern in self._order.keys() - set(self._regexes):
            dots = tuple(i for i, c in enumerate(pattern) if c == ".")
            alike = self._names.setdefault(len(pattern), {}).setdefault(dots, {})
            alike.setdefault(pattern.replace("/", "."), []).append(pattern)

    def matching(self, path: str) -> list[str]:
        """Returns the patterns that match the end of a path, the first first.

        Follows ``peft.utils.get_pattern_key``: the pattern must match the whole dotted path, or
        all that follows one of its dots. A "/" in a pattern stands for a dot.
        """
        path_dotted = path.replace("/", ".")
        found = {p for p in self._regexes if _at_the_end(p.replace("/", r"\.")).match(path_dotted)}
        for start in (0, *(m.end() for m in re.finditer(r"\.", path_dotted))):
            tail = path_dotted[start:]
            for dots, names in self._names.get(len(tail), {}).items():
                letters = list(tail)
                for i in dots:
                    letters[i] = "."
                found.update(names.get("".join(letters), ()))
        if not found:
            # A name with regex characters ("a+b") does not match itself; PEFT takes it literally.
            return [p for p in (path, path_dotted) if p in self._order][:1]
        return sorted(found, key=self._order.__getitem__)


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of `path`, as PEFT does."""
    if not patterns:
        return default
    index = patterns.index if isinstance(patterns, FrozenMapping) else Index(patterns)
    found = index.matching(path)
    return patterns[found[0]] if found else default


def check_inside(pattern: str) -> None:
    """Compiles a regex as a part of a longer one, which "(?i)a" cannot be.

    Raises:
      re.error: it cannot.
    """
    _at_the_end(pattern)


@functools.lru_cache(maxsize=4096)
def _at_the_end(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
