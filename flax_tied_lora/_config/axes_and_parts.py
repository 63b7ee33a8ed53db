"""Two fields of a `LoraConfig` that PEFT has not: axes of leaves, and parts of fused ones."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._config.checks import patterns
from flax_tied_lora._config.patterns import FrozenMapping, pattern_value

# The key of ``to_dict`` that holds the fields which PEFT does not know; PEFT's files go without.
OWN_KEY = "flax_tied_lora"
OWN_FIELDS = ("axes", "parts")
Axes = int | Sequence[int]
PartNames = Sequence[str] | Mapping[str, int]

_AXES = "(rows, columns), each an axis or a list of axes, for example (1, [0, 2])"
_PARTS = (
    '(axis, names) for parts of one size, or (axis, {name: size}), for example (1, ["q", "k", "v"])'
)


def axes(field: str, value: Any) -> FrozenMapping[Any]:
    """Returns a mapping from regexes to ``(rows, columns)``, tuples of axes."""
    return patterns(field, value, _sides)


def _sides(field: str, value: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(field, value, _AXES)
    rows, cols = (_axis_list(field, value, side) for side in value)
    return rows, cols


def _axis_list(field: str, whole: Any, side: Any) -> tuple[int, ...]:
    found = tuple(side) if isinstance(side, list | tuple) else (side,)
    if not found or not all(map(_is_int, found)):
        raise _wrong(field, whole, _AXES)
    return tuple(map(int, found))


def parts(field: str, value: Any) -> FrozenMapping[Any]:
    """Returns a mapping from regexes to ``(axis, names)`` or ``(axis, {name: size})``."""
    return patterns(field, value, _split)


def _split(field: str, value: Any) -> tuple[int, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not _is_int(value[0]):
        raise _wrong(field, value, _PARTS)
    axis, names = value
    if not isinstance(names, Mapping | list | tuple) or len(set(names)) != len(names) or not names:
        raise _wrong(field, value, _PARTS)
    for name in names:
        if not isinstance(name, str) or not name or set(name) & set(":/."):
            raise _wrong(field, value, f"names of parts without ':', '/' and '.', found {name!r}")
    if not isinstance(names, Mapping):
        return int(axis), tuple(names)
    for size in names.values():
        if not _is_int(size) or size < 1:
            raise _wrong(field, value, f"sizes above 0, found {size!r}")
    return int(axis), FrozenMapping({name: int(size) for name, size in names.items()})


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _wrong(field: str, value: Any, expected: str) -> Exception:
    kind = ValueError if isinstance(value, list | tuple) else TypeError
    return kind(f"LoraConfig: {field}={value!r} ({type(value).__name__}); expected {expected}")


def said_of(field: Mapping[str, Any], path: str) -> Any:
    """Returns what the first pattern that names a leaf or its module says of it; None if none."""
    module = path.rpartition("/")[0]
    return pattern_value(field, path, pattern_value(field, module, None) if module else None)


def value_for(field: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns what the first pattern that names a module says of it, or of the one it is part of.

    Args:
      field: pattern -> value.
      path: of a module, with ``:<part>`` for a part of it.
      default: where no pattern names it.
    """
    module = path.partition(":")[0]
    return pattern_value(field, path, pattern_value(field, module, default))


def parts_of_leaf(
    field: Mapping[str, Any], path: str, shape: tuple[int, ...]
) -> dict[str, tuple[int, int, int]]:
    """Returns a leaf's parts by name: axis, start and stop; none where the config has none.

    Raises:
      ValueError: the leaf has no such axis, or one of another size.
    """
    said = said_of(field, path)
    if said is None:
        return {}
    axis, names = said
    where = f"wrap: parts={{...: {axis, _shown(names)}}} for {path!r} {list(shape)}"
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{where}, which has no axis {axis}; expected 0 to {len(shape) - 1}")
    axis %= len(shape)
    if isinstance(names, tuple) and shape[axis] % len(names):
        raise ValueError(
            f"{where}: {shape[axis]} along axis {axis} is not {len(names)} times anything; give "
            "each part's size, as {name: size}"
        )
    share = shape[axis] // len(names)
    sizes: dict[str, int] = {n: share if isinstance(names, tuple) else names[n] for n in names}
    if sum(sizes.values()) != shape[axis]:
        raise ValueError(
            f"{where}: the sizes add up to {sum(sizes.values())}; expected {shape[axis]}, the size "
            f"of axis {axis}"
        )
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = axis, start, start + size
        start += size
    return found


def _shown(names: Any) -> Any:
    return dict(names) if isinstance(names, Mapping) else list(names)
