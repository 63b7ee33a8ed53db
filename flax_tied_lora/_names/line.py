"""One line of a table of names: patterns for a Flax path and a PyTorch name, and the layout."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax_tied_lora._names.axis_map import AxisMap
from flax_tied_lora._names.axis_maps import Offset
from flax_tied_lora._names.layout import KINDS, MATRIX, TorchWeight
from flax_tied_lora._names.layout_text import Layout, parse_layout
from flax_tied_lora._tree.paths import leaf_name

_PLACEHOLDER = re.compile(r"\{(\w*)\}")

# What people write for a line: strings, and behind them maps by the name of an axis.
LineEntry = Sequence[str | Mapping[str, AxisMap | Sequence[AxisMap]] | None]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table of names, checked.

    Attributes:
      path: pattern of Flax leaf paths.
      name: pattern of PyTorch parameter names.
      kind: of the parameter: see `TorchWeight`.
      layout: which axes are which.
      maps: as in `TorchWeight`.
      path_regex, name_regex: the two patterns, with a group for each placeholder.
    """

    path: str
    name: str
    kind: str
    layout: Layout
    maps: tuple[tuple[int, AxisMap], ...]
    path_regex: re.Pattern[str]
    name_regex: re.Pattern[str]

    def weights(
        self, path: str, ndim: int, shape: Sequence[int] | None
    ) -> tuple[TorchWeight, ...] | None:
        """Returns the parameters that a leaf is in PyTorch; None if the line is for other leaves.

        Raises:
          ValueError: the leaf has another number of axes than the layout, or there are as many
            parameters as the leaf has slices, and no shape to tell their number.
        """
        match = self.path_regex.fullmatch(path)
        if not match:
            return None
        if ndim != self.layout.ndim:
            size = f"of {ndim} axes" if shape is None else f"{list(shape)}"
            raise ValueError(
                f"leaf {path!r} {size} does not have the {self.layout.ndim} axes of its line in "
                f"the table of names, {(self.path, self.name)!r}: give that line a layout"
            )
        counted = [axis for axis, index in self.layout.part if isinstance(index, str)]
        if counted and shape is None:
            raise ValueError(
                f"{path!r} is several PyTorch parameters ({self.name}): give to_torch its shape, "
                "not the number of its axes"
            )
        sizes = [] if shape is None else [shape[axis] for axis in counted]
        return tuple(
            self._weight(match.groupdict(), dict(zip(counted, index, strict=True)))
            for index in _indices(sizes)
        )

    def leaf(self, name: str) -> tuple[str, TorchWeight] | None:
        """Returns the leaf of a PyTorch name, and where in it; None if the line is for others."""
        match = self.name_regex.fullmatch(name)
        if not match:
            return None
        fields = match.groupdict()
        index = {axis: int(fields[i]) for axis, i in self.layout.part if isinstance(i, str)}
        return _fill(self.path, fields), self._weight(fields, index)

    def _weight(self, fields: Mapping[str, str], index: Mapping[int, int]) -> TorchWeight:
        part = {axis: index.get(axis, i) for axis, i in self.layout.part}
        named = {i: str(part[axis]) for axis, i in self.layout.part if isinstance(i, str)}
        module, _, parameter = _fill(self.name, {**fields, **named}).rpartition(".")
        indices = tuple((axis, int(i)) for axis, i in part.items())
        return TorchWeight(module, parameter, self.kind, self.layout.dims, indices, self.maps)


def make_line(entry: Any, matrix: str = MATRIX) -> Line:
    """Returns a line of a table as people write it, checked.

    Args:
      entry: ``(path, name)``, ``(path, name, layout)`` or ``(path, name, layout, kind)``; behind
        them may be a dict with the maps of axes, by their name in the layout.
      matrix: kind of a parameter of two axes for which the entry has none.

    Raises:
      ValueError: the line, and what is wrong with it.
    """
    texts, maps = entry, {}
    if isinstance(entry, Sequence) and entry and isinstance(entry[-1], Mapping):
        texts, maps = entry[:-1], entry[-1]
    if (
        isinstance(texts, str)
        or not isinstance(texts, Sequence)
        or not 2 <= len(texts) <= 4
        or not all(isinstance(x, str) for x in texts[:2])
        or not all(x is None or isinstance(x, str) for x in texts[2:])
    ):
        raise ValueError(
            f"{entry!r} is no line of a table of names: expected (Flax path, PyTorch name), with "
            "a layout and a kind behind them if need be, all strings, and a dict of maps"
        )
    layout, kind = (*texts[2:], None, None)[:2]
    try:
        line = _checked(texts[0], texts[1], layout, kind, maps)
        return dataclasses.replace(line, kind=matrix) if line.kind == MATRIX else line
    except ValueError as error:
        raise ValueError(f"table of names, line {tuple(entry)!r}: {error}") from None


def _checked(
    path: str, name: str, text: str | None, kind: str | None, maps: Mapping[str, Any]
) -> Line:
    if "/" in name or not all(path.split("/")) or not all(name.split(".")):
        raise ValueError("expected a Flax path, joined by '/', and a PyTorch name, joined by '.'")
    layout = parse_layout(_default_layout(path) if text is None else text)
    fields, named = _fields(path), _fields(name)
    slices = {i for _, i in layout.part if isinstance(i, str)}
    if slices & fields:
        raise ValueError(f"{{{min(slices & fields)}}} is in the path and in the layout")
    if named != fields | slices:
        lone = min(named ^ (fields | slices))
        raise ValueError(
            f"the placeholder {{{'' if lone.startswith('_') else lone}}} is on one side only: each "
            "{} of the path (or {name} of path and layout) must be in the PyTorch name, too"
        )
    axes = len(layout.dims)
    kind = kind or _default_kind(name, axes)
    expected = {"linear": 2, "conv1d": 2, "embedding": 2, "vector": 1}.get(kind, axes)
    if kind not in (*KINDS, MATRIX):
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if axes != expected:
        raise ValueError(f"a {kind} parameter has {expected} axes, the layout gives it {axes}")
    of_axes = _maps(layout, maps)
    if any(isinstance(m, Offset) for _, m in of_axes) and (kind != "vector" or len(of_axes) > 1):
        raise ValueError(f"an Offset is the only map of a vector; found a {kind} with {maps}")
    return Line(path, name, kind, layout, of_axes, _regex(path), _regex(name, slices))


def _maps(layout: Layout, maps: Mapping[str, Any]) -> tuple[tuple[int, AxisMap], ...]:
    axes, result = dict(layout.names), []
    for name, of_axis in maps.items():
        if name not in axes:
            raise ValueError(
                f"the maps are of {name!r}, which is no axis of the leaf; the layout has "
                f"{', '.join(map(repr, axes)) or 'none'}"
            )
        for axis_map in of_axis if isinstance(of_axis, Sequence) else (of_axis,):
            if not isinstance(axis_map, AxisMap):
                raise ValueError(
                    f"the map of {name!r} is {axis_map!r}; expected Scale, Offset, Permutation, "
                    "Interleaved or Padding of flax_tied_lora.names, or several in a tuple"
                )
            result.append((axes[name], axis_map))
    return tuple(result)


def _default_layout(path: str) -> str:
    last = leaf_name(path)
    if last == "kernel":
        return "in out -> out in"
    return "row column -> row column" if last.endswith("embedding") else "d -> d"


def _default_kind(name: str, axes: int) -> str:
    if name.rpartition(".")[2] not in ("weight", "bias") or not axes:
        return "parameter"
    if axes > 2:
        return "conv"
    return "vector" if axes == 1 else MATRIX


def _numbered(pattern: str) -> str:
    """Returns a pattern whose ``{}`` have names: ``_0``, ``_1``, in order."""
    count = 0

    def name(placeholder: re.Match[str]) -> str:
        nonlocal count
        count += not placeholder[1]
        return placeholder[0] if placeholder[1] else f"{{_{count - 1}}}"

    return _PLACEHOLDER.sub(name, pattern)


def _fields(pattern: str) -> set[str]:
    """Returns the names of a pattern's placeholders; of ``{}``, those of `_numbered`."""
    names = [placeholder[1] for placeholder in _PLACEHOLDER.finditer(pattern)]
    given = [n for n in names if n]
    if re.search(r"[{}]", _PLACEHOLDER.sub("", pattern)) or not all(map(str.isidentifier, given)):
        raise ValueError(f"{pattern!r} has a brace that is no {{}} and no {{name}}")
    if len(set(given)) < len(given) or any(n.startswith("_") for n in given):
        raise ValueError(f"the placeholders of {pattern!r} must differ and not begin with '_'")
    return {f"_{i}" for i in range(len(names) - len(given))} | set(given)


def _regex(pattern: str, slices: Collection[str] = ()) -> re.Pattern[str]:
    text, start, numbered = "", 0, _numbered(pattern)
    for placeholder in _PLACEHOLDER.finditer(numbered):
        # A slice's number has one spelling only, so that its name is one to one with it.
        digits = "0|[1-9][0-9]*" if placeholder[1] in slices else "[0-9]+"
        text += re.escape(numbered[start : placeholder.start()])
        text += rf"(?P<{placeholder[1]}>{digits})"
        start = placeholder.end()
    return re.compile(text + re.escape(numbered[start:]))


def _fill(pattern: str, fields: Mapping[str, str]) -> str:
    """Returns a pattern with its placeholders filled in."""
    return _PLACEHOLDER.sub(lambda placeholder: fields[placeholder[1]], _numbered(pattern))


def _indices(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the indices of all elements of an array of this shape, in order."""
    return list(itertools.product(*map(range, sizes)))


def digest(text: str) -> str:
    """Returns a path, a name or a pattern with all numbers and placeholders alike: a lookup key."""
    return re.sub(r"\d+|\{\w*\}", "#", text)


def check_whole(path: str, weights: Sequence[TorchWeight], shape: Sequence[int]) -> None:
    """Raises ValueError unless the slices are the whole leaf, each once."""
    axes = [axis for axis, _ in weights[0].part]
    whole = set(_indices([shape[axis] for axis in axes]))
    indices = [tuple(i for _, i in w.part) for w in weights]
    same_axes = all([axis for axis, _ in w.part] == axes for w in weights)
    if not same_axes or len(weights) != len(whole) or set(indices) != whole:
        raise ValueError(
            f"{path!r} {list(shape)} is not covered once by its PyTorch parameters "
            f"{', '.join(w.name for w in weights)}: the table of names needs one line for each "
            f"index of axis {', '.join(map(str, axes)) or 'none'}"
        )


def suggestion(path: str, ndim: int) -> tuple[str, ...]:
    """Returns a line that would map an unmapped leaf, for an error's remedy."""
    pattern = re.sub(r"\d+", "{}", path)
    module, _, last = pattern.rpartition("/")
    parameter = "weight" if last in ("kernel", "embedding", "scale", "w") else last
    name = ".".join(filter(None, [module.replace("/", "."), parameter]))
    if parse_layout(_default_layout(pattern)).ndim == ndim:
        return pattern, name
    axes = [f"axis{i}" for i in range(ndim)]
    grouped = [f"({' '.join(axes[1:])})", axes[0]] if last in ("kernel", "w") and ndim > 1 else axes
    return pattern, name, f"{' '.join(axes)} -> {' '.join(grouped)}"
